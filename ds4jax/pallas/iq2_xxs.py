"""Tiles of IQ2_XXS weights times a row, within a kernel.

Nothing is converted: a grid row is looked up as eight codes of 2 bits, its signs are
put beside them, and `prmt` picks four bytes of eight by that.

On an H200 gate and up of six experts of 2048 x 4096 take 19.3 us, SwiGLU and fixed
point among it, and those of two rows 29.1.  `moe_ptx` is faster, where it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.pallas.dense import divisor
from ds4jax.pallas.fixed_point import FixedPoint, add_dot, assembly, in_turn, total
from ds4jax.quant import QuantTensor

_RUN = 4
"""Groups of a row that a thread takes: 16 bytes at once."""

_UNITS = 32
"""Runs that a program takes at a time: one for each thread of a warp."""

SPREAD = 0x4001
"""What a row's 16 bits are multiplied by to be eight nibbles."""


PICKED = 0x002B1908, 0x00D5E7F8
"""Bytes that `prmt` picks by a nibble: a code's weight, where bit 2 is set negative."""


def codes() -> np.ndarray:
    """Return the codes of the grid's rows, uint16 [256].

    Times SPREAD, bits 0 and 1 of nibble i are the code of weight i.  So the table has
    half the cache lines, which is what a look-up costs.
    """
    found = np.searchsorted([8, 25, 43], IQ2_GRID)
    carry = found[:, 0] + found[:, 7] > 3
    found[:, 4] = found[:, 4] - carry & 3
    return (found @ (4 ** np.array([0, 2, 4, 6, 1, 3, 5, 7]))).astype(np.uint16)


def activations(x: FixedPoint) -> list[Array]:
    """Return the operands that `multiply` reads of the activations, and its table."""
    return [_in_runs(x.words), _in_runs(x.scale), jnp.asarray(codes())]


def planes(w: QuantTensor) -> list[Array]:
    """Return the operands that `multiply` reads of a weight."""
    return [_in_runs(w.planes["grid"]), _in_runs(w.planes["signs"]), w.planes["d"]]


def _in_runs(groups: Array) -> Array:
    return groups.reshape(*groups.shape[:-1], -1, _RUN)


def multiply(
    x: Sequence[Any],
    tiles: Sequence[tuple[Sequence[Any], Array]],
    row: Array,
    expert: Array,
    height: int,
    interpret: bool,
) -> list[Array]:
    """Return the products of tiles of an expert's rows with a row, float32 `[height]`.

    Args:
      x: refs of `activations`: words [R, limbs, 8, G / 4, 4], scale [R, G / 4, 4],
        codes [256].
      tiles: each the refs of `planes` of its weight, grid and signs [E, N, G / 4, 4]
        and d [E, N, B], and its first row.
      row: of the activations.
      expert: whose rows.
      height: rows of a tile.
      interpret: whether the kernel is interpreted.
    """
    words_ref, scale_ref, codes_ref = x
    limbs, _, runs = words_ref.shape[1:4]
    units = divisor(runs, _UNITS)

    def load(step):
        own, run = pl.ds(step * units, units), step * units + jnp.arange(units)

        def of_tile(refs, first):
            grid_ref, signs_ref, d_ref = refs
            rows = pl.ds(first, height)
            places = first + jnp.arange(height)[:, None]
            block = run // (runs // d_ref.shape[2])
            return (
                grid_ref[expert, rows, own, :],
                signs_ref[expert, rows, own, :],
                d_ref[expert, places, block[None]],
            )

        return [of_tile(*tile) for tile in tiles]

    def product(step):
        own = pl.ds(step * units, units)
        words = [
            [words_ref[row, limb, word, own, :][None] for limb in range(limbs)]
            for word in range(8)
        ]
        scale = scale_ref[row, own, :][None] * 0.125

        def of_tile(grid, signs, d):
            sums = [jnp.zeros(grid.shape, jnp.int32)] * limbs
            selectors = _selectors(grid, signs, codes_ref, interpret)
            for word, selector in enumerate(selectors):
                sums = add_dot(sums, _pick(selector, interpret), words[word], interpret)
            # Eight times the scale, in whole numbers.
            times = (signs >> 27 | 1).astype(jnp.int32)
            parts = [part * times for part in (sums[0] * 256 + sums[1], *sums[2:])]
            return jnp.sum(total(parts) * scale, -1) * d.astype(jnp.float32)

        return of_tile

    zero = jnp.zeros((height, units), jnp.float32)
    sums = in_turn(load, product, runs // units, [zero] * len(tiles), ahead=False)
    return [jnp.sum(so_far, -1) for so_far in sums]


def _selectors(grid: Array, signs: Array, codes_ref: Any, interpret: bool):
    """Yield what picks each four weights of groups: code and sign in four nibbles."""
    signs = (signs & 0x0FFFFFFF) ^ (signs << 4)
    even, odd = signs & 0x55555555, signs & np.uint32(0xAAAAAAAA)
    for j, negative in enumerate((even << 2, odd << 1, even, odd >> 1)):
        codes = codes_ref[_byte(grid, j, interpret)].astype(jnp.uint32) * SPREAD
        # Bit 3 of a nibble has to be 0, and is: of every second row's signs only.
        selector = (codes & 0x33333333) | (negative & np.uint32(0xCCCCCCCC))
        yield selector
        yield selector >> 16


def _byte(words: Array, j: int, interpret: bool) -> Array:
    if interpret:
        return (words >> (8 * j) & 255).astype(jnp.int32)
    return assembly(f"prmt.b32 $0, $1, 0, 0x444{j};", words)


def _pick(selector: Array, interpret: bool) -> Array:
    """Return the four weights that four nibbles say, as signed bytes."""
    if not interpret:
        weights = ", ".join(f"0x{word:08X}" for word in PICKED)
        found = assembly(f"prmt.b32 $0, {weights}, $1;", selector)
        return jax.lax.bitcast_convert_type(found, jnp.uint32)
    nibble = selector[..., None] >> 4 * jnp.arange(4, dtype=jnp.uint32)
    code = nibble & 3
    magnitude = jnp.where(code == 0, 8, jnp.where(code == 1, 25, 43))
    signed = jnp.where(nibble & 4 > 0, -magnitude, magnitude)
    return jax.lax.bitcast_convert_type(signed.astype(jnp.int8), jnp.uint32)
