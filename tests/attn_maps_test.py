"""All maps of attention's input in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools

import hc_ptx_test as hc
import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import Machine

from ds4jax import schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.model.attention import Attention
from ds4jax.model.attention_input import project_streams
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm, scope
from ds4jax.pallas import attn_maps, attn_maps_program, hc_ptx, ptx
from ds4jax.pallas.attn_maps import Maps
from ds4jax.pallas.attn_maps_shape import Map, Shape
from ds4jax.pallas.fixed_point import LIMBS
from ds4jax.pallas.passes import DecodePass, within
from ds4jax.pallas.ptx import SHARED
from ds4jax.pallas.q8_arithmetic import WARPS
from ds4jax.quant import QuantTensor, dequantize

ROWS, WRITTEN, EPS = 2, 8, 1e-6
INPUT, LATENT = 2048, 1024
SCARCE = 120_000
"""Bytes with room for two tasks' weights, and few rows' activations."""
NEAR = {"bfloat16": 2e-3, "float32": 3e-6}
"""Of the largest: bfloat16 may round to a neighbour what float32 sums leave between."""
same = np.testing.assert_array_equal


def quantised(seed: int, rows: int, columns: int) -> QuantTensor:
    return synthetic.blocks(jax.random.key(seed), "Q8_0", (rows, columns))


def plain(seed: int, rows: int, columns: int) -> jax.Array:
    return drawn(seed, rows, columns).astype(jnp.float16)


def drawn(seed: int, *shape: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


@functools.cache
def maps() -> Maps:
    return Maps(
        (
            quantised(0, LATENT, INPUT),
            quantised(1, 64, INPUT),
            plain(2, 24, INPUT),
            plain(3, 8, INPUT),
        ),
        (drawn(4, LATENT), EPS),
        (quantised(5, 160, LATENT), plain(6, 48, LATENT)),
    )


@functools.cache
def run(
    dtype: str, rows: int, programs: int, room: int = SHARED
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Return what programs write, and products; rows not to be computed are NaNs."""
    read = hc.first_rows(hc.reading(dtype, 2, width=INPUT), rows)
    s = attn_maps.shape(rows, read, maps(), programs)._replace(room=room)
    assert s.slots >= 2
    given = attn_maps.operands(s, read, maps())
    # NaNs where nothing is written.
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in attn_maps.written(s)
    ]
    operands = [*map(np.array, given), *written]
    Machine(attn_maps_program.program(s), operands, s.shared, WARPS).run(programs, rows)
    found = dict(zip(s.operands[:-1], operands, strict=True))
    same(found["counters"], 0)
    return found, [found[m.out] for m in s.maps]


def expected(dtype: str, x: np.ndarray, latent: np.ndarray) -> list[np.ndarray]:
    """Return each map's products, of an input and a latent that were found."""
    value = lambda w: np.asarray(dequantize(w), np.float64)  # noqa: E731
    rounded = lambda x: np.asarray(jnp.asarray(x).astype(dtype), np.float64)  # noqa: E731
    weights, own = maps(), latent.astype(np.float64)
    mean = np.mean(own**2, -1, keepdims=True)
    normed = own / np.sqrt(mean + EPS) * np.asarray(weights.norm[0], np.float64)
    first = [rounded(x) @ value(w).T for w in weights.first]
    return first + [rounded(normed) @ value(w).T for w in weights.second]


@pytest.mark.parametrize("room", [SHARED, SCARCE])
@pytest.mark.parametrize("dtype", LIMBS)
def test_a_program_computes_all_maps(dtype, room):
    """Seen red without each of the waits, and without a meeting before the latent.

    With one warp's squares for all, halves of a group or of a lane's columns where
    others read them, no norm, one group's scale for all, halves of words exchanged, a
    limb that is not carried, and rows written where the row before is.
    """
    found, products = run(dtype, ROWS, 5, room)
    hc.assert_near(found, hc.expected(hc.reading(dtype, 2, width=INPUT)), ROWS)
    of_own = expected(dtype, found["x"][:ROWS], products[0][:ROWS])
    for own, product in zip(products, of_own, strict=True):
        error = np.max(abs(own[:ROWS] - product))
        assert error <= NEAR[dtype] * np.max(abs(product))
        same(own[ROWS:], np.repeat(own[ROWS - 1][None], WRITTEN - ROWS, 0))


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, and whatever there is room for."""
    _, whole = run("bfloat16", 4, 8, SCARCE)
    for rows, programs in ((1, 1), (2, 40)):
        _, found = run("bfloat16", rows, programs)
        for own, other in zip(found, whole, strict=True):
            same(own[:rows], other[:rows])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_it_is_for_a_gpu_and_not_for_a_cpu(layer, monkeypatch):
    """In layers of each kind, and never without an update."""
    config = ModelConfig.flash(hidden=INPUT)
    types, prefix = QuantPlan.named("ds4-q2").types, f"blk.{layer}."

    def drawn_weights():
        return {
            name.removeprefix(prefix): synthetic.tensor(config, name, s, types[s.group])
            for name, s in schema.trunk(config).items()
            if name.startswith(prefix) and "ffn" not in name and "exp" not in name
        }

    def lowered(updated: bool = True) -> str:
        def run(streams, update, own):
            norm = RMSNorm(own["attn_norm.weight"], config.rms_eps)
            connection = HyperConnection(config, scope(own, "hc_attn_"))
            maps = Attention(config, config.compress_ratios[layer], own).input_maps
            update = Update(*update) if updated else None
            with within(DecodePass(2, jnp.int32(2))):
                return project_streams(maps, connection, norm, streams, update)

        whole = hc.reading(config.dtype, 2, width=INPUT)
        given = jax.tree.map(lambda a: a[None], whole[:2])
        return hopper.lowered(run, *given, jax.eval_shape(drawn_weights))

    apart, together = "hc_mixed", "attn_maps_2x1024_512"
    text = lowered()
    assert apart in text and together not in text
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    text = lowered()
    assert together in text and apart not in text
    assert together not in lowered(updated=False)


def test_memory_is_enough_for_all_rows():
    """Of a decode pass, at the shape of Flash's layers with the most maps."""
    shapes = [(1024, True), (512, True), (1024, False), (1024, False), (256, False)]
    shapes += [(256, False), (64, False)]
    first = [Map(f"map{i}", q, n, 4096, False) for i, (n, q) in enumerate(shapes)]
    second = Map("map7", True, 32768, 1024, True), Map("map8", False, 8192, 1024, True)
    for dtype in LIMBS:
        given = hc.reading(dtype, 2, width=4096)
        for rows in range(1, 9):
            reading = hc_ptx.shape(given, rows, 132)
            s = Shape((*first, *second), EPS, reading)
            assert s.slots >= 2 and s.shared <= SHARED


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"latent": (512, INPUT)}, False),
        ({"kv": (60, INPUT)}, False),
        ({"kv_format": "Q4_K"}, False),
        ({"of_input": jnp.float32}, False),
        ({"of_input": jnp.bfloat16}, False),
        ({"gate": (16, INPUT)}, True),
        ({"gate": (12, INPUT)}, False),
        ({"query": (80, LATENT)}, False),
    ],
)
def test_what_it_serves(changes, expected):
    given = dict(
        latent=(LATENT, INPUT), kv=(64, INPUT), kv_format="Q8_0", gate=(24, INPUT),
        of_input=jnp.float16, query=(160, LATENT),
    ) | changes  # fmt: skip
    own = hc.reading("bfloat16", 1, width=INPUT)

    def weights():
        blocks = lambda format, size: synthetic.blocks(jax.random.key(0), format, size)  # noqa: E731
        kv = blocks(given["kv_format"], given["kv"])
        return [blocks("Q8_0", given["latent"]), kv, blocks("Q8_0", given["query"])]

    *first, query = jax.eval_shape(weights)
    gate = jnp.zeros(given["gate"], given["of_input"])
    found = Maps((*first, gate), (drawn(4, LATENT), EPS), (query,))
    assert attn_maps.serves(own, found, 132) == expected
    assert not attn_maps.serves(own._replace(update=None), found, 132)
