"""A hyper connection's reading of the streams in PTX, run by the tests' own machine.

Here it is a launch of its own, though a model's begin with it and go on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import Machine

from ds4jax.config import ModelConfig
from ds4jax.pallas import hc_program, hc_ptx, hc_shape
from ds4jax.pallas.fixed_point import fix
from ds4jax.pallas.hc_shape import MAPS, STREAMS, WARPS, Shape
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.ptx import Place, begin, bind
from ds4jax.pallas.ptx_fixed_point import APART, declare

WIDTH, WRITTEN = 512, 8
ITERATIONS = 5
"""Of Sinkhorn: few enough that one fewer shows."""
PLACE = Place(shared=256, counters=4 * APART, barrier=2)
NEAR = {"streams": 1e-6, "x": 3e-6, "post": 3e-6, "mix": 3e-6}
"""Of the largest.  Streams are sums of six products; all else comes of sums of two
thousand, in float32, that are added up in another order, and of an exponential."""
same = np.testing.assert_array_equal


def reading(
    dtype: str, parts: int, fn: str = "float16", width: int = WIDTH, rows: int = WRITTEN
) -> Reading:
    """Return weights, and of some rows streams and what is to be merged into them."""
    random = np.random.default_rng(0)
    drawn = lambda *sizes: jnp.asarray(  # noqa: E731
        random.normal(size=sizes), jnp.float32
    )
    config = ModelConfig.flash(
        hidden=width, dtype=dtype, sinkhorn_iters=ITERATIONS, hc_eps=1e-3, rms_eps=0.01
    )
    streams = drawn(rows, STREAMS, width) * 3
    outputs = tuple(drawn(rows, width) for _ in range(parts))
    update = outputs, drawn(rows, STREAMS), drawn(rows, STREAMS, STREAMS)
    weight = (drawn(MAPS, STREAMS * width) / 16).astype(fn)
    scale, norm = drawn(3) + 1, drawn(width)
    own = weight, drawn(MAPS), scale, norm, config
    return Reading(streams, update, *own)


def first_rows(whole: Reading, rows: int) -> Reading:
    """Return it with NaNs for the rows that are not computed."""
    of_rows = whole.streams, whole.update
    streams, update = jax.tree.map(lambda a: a.at[rows:].set(jnp.nan), of_rows)
    return whole._replace(streams=streams, update=update)


def text(s: Shape) -> str:
    """Return the text of a launch that does nothing else."""
    start = """{
    .reg .pred p, first;
    .reg .b32 thread, lane, warp, shared, a, b, c, row, turn;
    .reg .b64 address, base;
    .reg .f32 f, g, sum<8>;"""
    start += declare(s.dtype) + hc_program.declare(s) + begin()
    start += """
    mov.b64 base, %shared;
    cvt.u32.u64 shared, base;"""
    names = *s.read_operands, "counters", *s.written_operands, "shared"
    program = start + hc_program.load(s, PLACE) + hc_program.prologue(s, PLACE)
    return bind(program, names) + "\n}"


@functools.cache
def run(
    dtype: str, rows: int, programs: int, parts: int, fn: str = "float16"
) -> dict[str, np.ndarray]:
    """Return what programs write, and NaNs where they write nothing."""
    given = first_rows(reading(dtype, parts, fn), rows)
    s = hc_ptx.shape(given, rows, programs)
    counters = np.zeros(s.counters + APART, np.uint32)
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in hc_ptx.written(s)
    ]
    operands = [*map(np.array, hc_ptx.operands(given)), counters, *written]
    shared = PLACE.shared + s.shared
    Machine(text(s), operands, shared, WARPS).run(programs, seed=rows)
    same(counters, 0)
    return dict(zip(s.written_operands, written, strict=True))


def expected(own: Reading) -> dict[str, np.ndarray]:
    """Return what `model.hyper.HyperConnection` would give, in float64."""
    streams, update, weight, base, scale, norm, c = own
    rows = len(streams)
    exact = lambda a: np.asarray(a, np.float64)  # noqa: E731
    assert update
    outputs, post, mix = update
    streams = np.einsum("rjk,rjd->rkd", exact(mix), exact(streams))
    output = np.sum([exact(part) for part in outputs], 0)
    streams += exact(post)[..., None] * output[:, None]
    flat = streams.reshape(rows, -1)
    root = lambda x: np.sqrt(np.mean(x * x, -1, keepdims=True) + c.rms_eps)  # noqa: E731
    each = np.repeat(exact(scale), [STREAMS, STREAMS, STREAMS**2])
    maps = flat / root(flat) @ exact(weight).T * each + exact(base)
    pre, post, logits = np.split(maps, [STREAMS, 2 * STREAMS], 1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    x = np.einsum("rk,rkd->rd", sigmoid(pre) + c.hc_eps, streams)
    mix = np.exp(logits.reshape(rows, STREAMS, STREAMS))
    mix = mix / mix.sum(2, keepdims=True) + c.hc_eps
    mix /= mix.sum(1, keepdims=True) + c.hc_eps
    for _ in range(c.sinkhorn_iters - 1):
        mix /= mix.sum(2, keepdims=True) + c.hc_eps
        mix /= mix.sum(1, keepdims=True) + c.hc_eps
    x = x / root(x) * exact(norm)
    return {"streams": streams, "x": x, "post": 2 * sigmoid(post), "mix": mix}


def assert_near(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], rows: int):
    """Compare what a launch wrote of a connection with `expected`."""
    for name, close in NEAR.items():
        exact = wanted[name][:rows]
        near = close * np.abs(exact).max()
        np.testing.assert_allclose(
            found[name][:rows], exact, rtol=0, atol=near, err_msg=name
        )


@pytest.mark.parametrize(
    "dtype, rows, programs, parts, fn",
    [
        ("bfloat16", 1, 20, 1, "float16"),
        ("float32", 2, 16, 2, "float16"),
        ("bfloat16", 3, 5, 2, "float32"),
        ("float32", 8, 17, 1, "float16"),
    ],
)
def test_programs_read_streams_as_the_model_does(dtype, rows, programs, parts, fn):
    """Seen red without each of the waits and meetings, and with faults of values.

    A counter that wraps late; the norm's weight or the streams of another group; `mix`
    transposed, a part left out, pairs of streams counted once or of other streams, no
    `hc_eps`, Sinkhorn without its last round, copies of `x` left out.
    """
    found = run(dtype, rows, programs, parts, fn)
    assert_near(found, expected(reading(dtype, parts, fn)), rows)
    for name in NEAR:
        last = found[name][rows - 1]
        same(found[name][rows:], np.repeat(last[None], WRITTEN - rows, 0))
    fixed = fix(jnp.asarray(found["x"][:rows]), dtype, interpret=True)
    same(found["x_words"], fixed.words)
    same(found["x_scale"], fixed.scale)


@pytest.mark.parametrize("rows, programs", [(2, 3), (3, 24), (8, 16)])
def test_whatever_the_number_of_rows_and_programs(rows, programs):
    """The same bits."""
    one, several = run("bfloat16", 1, 20, 1), run("bfloat16", rows, programs, 1)
    for name in ("streams", "x", "post", "mix", "x_words", "x_scale"):
        same(several[name][0], one[name][0])


@pytest.mark.parametrize(
    "streams, width, rows, fn, expected",
    [
        (4, 4096, 8, "float16", True),
        (4, 256, 1, "float32", True),
        (2, 4096, 8, "float16", False),
        (4, 4096, 9, "float16", False),
        (4, 8192, 8, "float16", False),
        (4, 4128, 8, "float16", False),
        (4, 4096, 8, "bfloat16", False),
    ],
)
def test_what_it_serves(streams, width, rows, fn, expected):
    assert hc_shape.serves(streams, width, rows, fn) == expected


def test_it_serves_what_follows_a_block():
    own = reading("bfloat16", 1)
    assert hc_ptx.serves(own)
    assert not hc_ptx.serves(own._replace(update=None))
