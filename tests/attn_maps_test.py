"""All maps of attention's input in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools

import hc_ptx_test as hc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.pallas import attn_maps, attn_maps_program
from ds4jax.pallas.attn_maps import Maps
from ds4jax.pallas.attn_maps_shape import WARPS
from ds4jax.pallas.fixed_point import LIMBS
from ds4jax.pallas.ptx import SHARED
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
