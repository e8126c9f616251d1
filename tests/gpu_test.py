"""What only a GPU shows: its kernels' results, and the bits of whole passes.

On a GPU without packed weights, or of another make, XLA's own operations are what is
tested here.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pallas_kept_row_test as kept
import pytest

from ds4jax import assets, gguf, schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.modes import GREEDY, Decoding, Mode
from ds4jax.model import deepseek
from ds4jax.model.attention import Attention, Source
from ds4jax.model.attention_input import project_streams
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm, scope
from ds4jax.model.moe import MoE
from ds4jax.pallas import attn_maps, attn_out, moe_ptx, two_maps
from ds4jax.pallas.fixed_point import LIMBS, fix
from ds4jax.pallas.matmul import two_maps_kernel
from ds4jax.pallas.passes import DecodePass, Weight, within
from ds4jax.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu
same = np.testing.assert_array_equal
TOKENS = 96
MODES = [Mode(kind, depth) for kind in ("continuous", "chained") for depth in (1, 2, 4)]
NEAR = 2e-3
"""Of the largest logit: CPU and GPU sum six layers in different orders, and operands of
float32 have 22 bits in the kernels."""


def shipped(dtype: str = "float32", packed: bool = True) -> deepseek.Model:
    config, trunk = gguf.load_trunk(assets.trunk())
    config = dataclasses.replace(config, dtype=dtype)
    return deepseek.build(config, trunk, gguf.load_mtp(assets.mtp(), config), packed)


def flash(layers: int) -> deepseek.Model:
    config = dataclasses.replace(
        synthetic.shorten(ModelConfig.flash(), layers), dtype="bfloat16"
    )
    return deepseek.synthetic_model(config, "ds4-q2")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return shipped(request.param)


def prompt(text: str) -> list[int]:
    tokenizer = Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)
    ids = tokenizer.encode(assets.prompt(text).read_text())
    return [tokenizer.bos, *ids][:200]


@jax.jit
def step(model, tokens, cache):
    out = model.modules().trunk(tokens, cache)
    return out.logits[0], out.streams[0], out.cache


def by_widths(model, tokens, widths):
    """Return the logits, streams and state of a text read in passes of `widths`."""
    cache = carries.create(model.config, 512, mtp=False).cache
    logits, streams, start = [], [], 0
    for width in widths:
        part = jnp.asarray([tokens[start : start + width]], jnp.int32)
        more, of_stack, cache = step(model, part, cache)
        logits.append(np.asarray(more))
        streams.append(np.asarray(of_stack))
        start += width
    return np.concatenate(logits), np.concatenate(streams), cache


def assert_row_contract(model, tokens):
    expected = by_widths(model, tokens, [1] * len(tokens))
    for widths in ([2] * 12, [3] * 8, [4] * 6, [8] * 3, [1, 2, 5, 4, 7, 5]):
        found = by_widths(model, tokens, widths)
        jax.tree.map(same, found, expected)


def test_the_row_contract(model):
    """Every width gives the bits of one row at a time: logits, streams and state."""
    assert_row_contract(model, prompt("technical")[:24])


def test_the_row_contract_at_the_shape_of_flash():
    tokens = np.random.default_rng(0).integers(129280, size=24)
    assert_row_contract(flash(5), tokens.tolist())


@pytest.mark.parametrize("text", ["copy", "technical", "prose"])
def test_modes_commit_the_tokens_of_plain_decoding(model, text):
    tokens = prompt(text)

    def run(how):
        carry = driver.start(model, tokens, TOKENS, how)
        return driver.committed(driver.run(model, carry, how))

    # At once: most of the time they compile.
    with ThreadPoolExecutor() as pool:
        ways = [GREEDY, *(Decoding(mode=mode) for mode in MODES)]
        plain, *found = pool.map(run, ways)
    assert len(plain) == len(tokens) + TOKENS
    for mode, committed in zip(MODES, found, strict=True):
        assert committed == plain, mode


@pytest.mark.parametrize("packed", [True, False])
def test_the_cpu_agrees(packed):
    """The same logits but for rounding, and on most prompts the same tokens."""
    tokens = prompt("prose")[:48]
    found = by_widths(shipped(packed=packed), tokens, [4] * 12)[0]
    with jax.default_device(jax.devices("cpu")[0]):
        expected = by_widths(shipped(), tokens, [4] * 12)[0]
    assert np.max(abs(found - expected)) <= NEAR * np.max(abs(expected))


def of_layer(config: ModelConfig, layer: int) -> dict[str, Weight]:
    """Return a layer's weights, by their names in it."""
    types, prefix = QuantPlan.named("ds4-q2").types, f"blk.{layer}."
    return {
        name.removeprefix(prefix): synthetic.tensor(config, name, s, types[s.group])
        for name, s in schema.trunk(config).items()
        if name.startswith(prefix)
    }


def drawn_streams(config: ModelConfig) -> tuple[jax.Array, Update]:
    """Return streams of eight rows, and what is to be merged into them."""
    sizes = (4, config.hidden), (config.hidden,), (4,), (4, 4)
    keys = jax.random.split(jax.random.key(6), len(sizes))
    streams, output, post, mix = (
        jax.random.normal(key, (1, 8, *size))
        for key, size in zip(keys, sizes, strict=True)
    )
    return streams, Update((output,), post, mix)


def assert_same_by_width(name: str, run, *operands):
    """Assert that a launch gives the same bits at every width, if the GPU has it."""
    if name not in run.lower(8, *operands).as_text():
        pytest.skip("this GPU has no such programs")
    whole = run(8, *operands)
    for width in (1, 2, 3, 4):
        for found, expected in zip(run(width, *operands), whole, strict=True):
            same(found[0, :width], expected[0, :width])
            same(found[0, width:], jnp.repeat(found[:, width - 1], 8 - width, 0))


WORST = {"float32": 1e-5, "bfloat16": 2.0**-9}
"""Of the largest.  An operand of bfloat16 may be rounded to a neighbour, 2^-8 away, but
of many: on an H200 results differ by up to 2^-10, in float32 by 2.7e-6."""


def assert_near(whole, by_triton, worst: float):
    """Assert that results differ by what an operand rounded otherwise makes of them."""
    for found, expected in zip(whole, by_triton, strict=True):
        assert np.max(abs(found - expected)) <= worst * np.max(abs(expected))


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("dtype", LIMBS)
def test_maps_of_the_input_in_ptx_and_by_triton(dtype, layer, monkeypatch):
    """The same but for the order of sums; in PTX, the same bits at every width."""
    config = ModelConfig.flash(experts=8, dtype=dtype)
    own, ratio = of_layer(config, layer), config.compress_ratios[layer]
    streams, update = drawn_streams(config)

    @functools.partial(jax.jit, static_argnums=0)
    def run(width, streams, update, own):
        norm = RMSNorm(own["attn_norm.weight"], config.rms_eps)
        connection = HyperConnection(config, scope(own, "hc_attn_"))
        attention = Attention(config, ratio, own)
        with within(DecodePass(width, jnp.int32(width))):
            found = project_streams(
                attention.input_maps, connection, norm, streams, update
            )
        return jax.tree.leaves(found)

    assert_same_by_width("attn_maps_8x", run, streams, update, own)
    whole = run(8, streams, update, own)
    monkeypatch.setattr(attn_maps, "programs", lambda *_: 0)
    jax.clear_caches()
    assert_near(whole, run(8, streams, update, own), WORST[dtype])


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("dtype", LIMBS)
def test_experts_in_ptx_and_by_triton(dtype, hashed, monkeypatch):
    """The same but for the order of sums; in PTX, the same bits at every width.

    With the hyper connection's reading of the streams before it.
    """
    config = ModelConfig.flash(experts=64, dtype=dtype)
    own = of_layer(config, 0 if hashed else config.hash_layers)
    streams, update = drawn_streams(config)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(width, streams, update, own):
        norm = RMSNorm(own["ffn_norm.weight"], config.rms_eps)
        connection = HyperConnection(config, scope(own, "hc_ffn_"))
        moe = MoE(config, hashed, own)
        with within(DecodePass(width, jnp.int32(width))):
            parts, *others = moe.of_streams(connection, norm, streams, update, tokens)
        return *parts, *others

    operands = streams, update, own
    assert_same_by_width("moe_8x6", run, *operands)
    whole = run(8, *operands)
    monkeypatch.setattr(moe_ptx, "programs", lambda *_: 0)
    jax.clear_caches()
    assert_near(whole, run(8, *operands), WORST[dtype])


def test_kept_rows():
    """As by XLA but for the order of sums; the same bits at every width."""
    keep = functools.partial(kept.keep, interpret=False)
    found, wanted = (kept.filled(kept.WIDTHS, step) for step in (keep, kept.expected))
    np.testing.assert_allclose(found, wanted, rtol=kept.NEAR, atol=kept.NEAR)
    one = kept.filled([1] * 24, keep)
    for width in (2, 3, 4, 8):
        same(kept.filled([width] * (24 // width), keep), one)


@pytest.mark.parametrize("compressed, chosen", [(0, 0), (2048, 512), (516, 0)])
def test_attention_and_its_output_in_ptx_and_by_triton(compressed, chosen, monkeypatch):
    """The same but for the order of sums; in PTX, the same bits at every width."""
    config = ModelConfig.flash(experts=8, dtype="bfloat16")
    own, k, window = of_layer(config, 0), config.head_dim, config.window + 8
    keys = iter(jax.random.split(jax.random.key(7), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    draw = lambda *shape: jax.random.uniform(next(keys), shape)  # noqa: E731
    sources = [Source(normal(1, window, k), draw(1, 8, window) < 0.9)]
    if compressed:
        index, size = None, chosen or compressed
        if chosen:
            index = jax.random.randint(next(keys), (1, 8, size), 0, compressed)
        sources.append(Source(normal(1, compressed, k), draw(1, 8, size) < 0.7, index))
    query, positions = normal(1, 8, config.heads, k), jnp.arange(8)[None] + 1000

    @functools.partial(jax.jit, static_argnums=0)
    def run(width, query, sources, own):
        with within(DecodePass(width, jnp.int32(width))):
            return [Attention(config, 0, own)._attend(query, sources, positions)]

    operands = query, sources, own
    assert_same_by_width("attn_out_8x", run, *operands)
    whole = run(8, *operands)
    monkeypatch.setattr(attn_out, "programs", lambda *_: 0)
    jax.clear_caches()
    # Weights are rounded too, and results between the maps: on an H200 by up to 2^-8.3.
    assert_near(whole, run(8, *operands), 2.0**-8)


@pytest.mark.parametrize("dtype", LIMBS)
def test_two_maps_in_ptx_and_by_triton(dtype, monkeypatch):
    """The same but for the order of sums; in PTX, the same bits at every width."""
    groups, middle, columns = 8, 8192, 4096
    first, second = (
        synthetic.blocks(jax.random.key(i), "Q8_0", shape)
        for i, shape in enumerate([(middle, columns), (4096, middle)])
    )
    if not two_maps.programs(first, second, groups, dtype):
        pytest.skip("this GPU has no such programs")
    x = jax.random.normal(jax.random.key(2), (8 * groups, columns))

    @functools.partial(jax.jit, static_argnums=0)
    def run(width, x, first, second):
        kernel = two_maps_kernel(first, second, groups, dtype)
        assert kernel
        return kernel(width, fix(x, dtype))[0]

    whole = run(8, x, first, second)
    for width in (1, 2, 3, 4):
        found = run(width, x, first, second)
        same(found[:width], whole[:width])
        same(found[width:], jnp.repeat(found[width - 1][None], 8 - width, 0))
    monkeypatch.setattr(two_maps, "programs", lambda *_: 0)
    jax.clear_caches()
    by_triton = run(8, x, first, second)
    # What is between the maps is rounded too.
    worst = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    assert_near([whole], [by_triton], worst)
