"""All maps of attention's input in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.pallas import attn_maps, attn_maps_program
from ds4jax.pallas.attn_maps import Maps
from ds4jax.pallas.attn_maps_shape import WARPS
from ds4jax.pallas.fixed_point import LIMBS, fix
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
def run(dtype: str, rows: int, programs: int, room: int = SHARED) -> list[np.ndarray]:
    """Return what programs write; the rows not to be computed are NaNs."""
    x = drawn(7, WRITTEN, INPUT).at[rows:].set(jnp.nan)
    s = attn_maps._shape(maps(), dtype, programs, rows, WRITTEN)._replace(room=room)
    given = attn_maps.operands(s, x, fix(x, dtype, interpret=True), maps())
    # NaNs where nothing is written.
    written = [np.full(a.shape, np.nan, np.float32) for a in attn_maps.written(s)]
    operands = [*map(np.array, given), *written]
    Machine(attn_maps_program.program(s), operands, s.shared, WARPS).run(programs, rows)
    same(operands[s.operands.index("counters")], 0)
    return written


def expected(dtype: str, latent: np.ndarray) -> list[np.ndarray]:
    """Return each map's products, those of the latent of one that was found."""
    value = lambda w: np.asarray(dequantize(w), np.float64)  # noqa: E731
    rounded = lambda x: np.asarray(jnp.asarray(x).astype(dtype), np.float64)  # noqa: E731
    found, own = maps(), latent.astype(np.float64)
    mean = np.mean(own**2, -1, keepdims=True)
    normed = own / np.sqrt(mean + EPS) * np.asarray(found.norm[0], np.float64)
    x = rounded(drawn(7, WRITTEN, INPUT)[: len(latent)])
    first = [x @ value(w).T for w in found.first]
    return first + [rounded(normed) @ value(w).T for w in found.second]


@pytest.mark.parametrize("room", [SHARED, SCARCE])
@pytest.mark.parametrize("dtype", LIMBS)
def test_a_program_computes_all_maps(dtype, room):
    found = run(dtype, ROWS, 5, room)
    for own, product in zip(found, expected(dtype, found[0][:ROWS]), strict=True):
        error = np.max(abs(own[:ROWS] - product))
        assert error <= NEAR[dtype] * np.max(abs(product))
        same(own[ROWS:], np.repeat(own[ROWS - 1][None], WRITTEN - ROWS, 0))


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, and whatever there is room for."""
    whole = run("bfloat16", 4, 2, SCARCE)
    for rows, programs in ((1, 1), (2, 40)):
        for own, other in zip(run("bfloat16", rows, programs), whole, strict=True):
            same(own[:rows], other[:rows])
