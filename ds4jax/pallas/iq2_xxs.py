"""Tiles of IQ2_XXS weights times a row, within a kernel.

Nothing is converted: a grid row is looked up as eight codes of 2 bits, its signs are
put beside them, and `prmt` picks four bytes of eight by that.

On an H200 gate and up of six experts of 2048 x 4096 take 21.4 us, SwiGLU and fixed
point among it.  A spike in Mosaic GPU took 14.5 us for the products alone, with a body
that only a GPU can run (benchmarks/NOTES.md).
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
from ds4jax.pallas.fixed_point import FixedPoint, add_dot, assembly, in_turn, total
from ds4jax.quant import QuantTensor

_UNITS = 32
"""Groups of a row that a program takes at a time: one for each thread of a warp."""

_SPREAD = 0x4001


def _codes() -> np.ndarray:
    """Return the codes of the grid's rows, uint16 [256].

    Times _SPREAD, bits 0 and 1 of nibble i are the code of weight i.  So the table has
    half the cache lines, which is what a look-up costs.
    """
    codes = np.searchsorted([8, 25, 43], IQ2_GRID)
    carry = codes[:, 0] + codes[:, 7] > 3
    codes[:, 4] = codes[:, 4] - carry & 3
    return (codes @ (4 ** np.array([0, 2, 4, 6, 1, 3, 5, 7]))).astype(np.uint16)


def activations(x: FixedPoint) -> list[Array]:
    """Return the operands that `multiply` reads of the activations, and its table."""
    return [x.words, x.scale, jnp.asarray(_codes())]


def planes(w: QuantTensor) -> list[Array]:
    """Return the operands that `multiply` reads of a weight."""
    return [w.planes[name] for name in ("grid", "signs", "d")]


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
      x: refs of `activations`: words [R, limbs, 8, G], scale [R, G], codes [256].
      tiles: each the refs of `planes` of its weight, grid and signs [E, N, G] and d
        [E, N, B], and its first row.
      row: of the activations.
      expert: whose rows.
      height: rows of a tile.
      interpret: whether the kernel is interpreted.
    """
    words_ref, scale_ref, codes_ref = x
    limbs, _, groups = words_ref.shape[1:]
    units = min(groups & -groups, _UNITS)

    def load(step):
        own = pl.ds(step * units, units)
        block = (step * units + jnp.arange(units)) // (
            groups // tiles[0][0][2].shape[2]
        )

        def of_tile(refs, first):
            grid_ref, signs_ref, d_ref = refs
            rows = pl.ds(first, height)
            places = first + jnp.arange(height)[:, None]
            return (
                grid_ref[expert, rows, own],
                signs_ref[expert, rows, own],
                d_ref[expert, places, block[None]],
            )

        return [of_tile(*tile) for tile in tiles]

    def product(step):
        own = pl.ds(step * units, units)
        words = [
            [words_ref[row, limb, word, own][None] for limb in range(limbs)]
            for word in range(8)
        ]
        x_scale = scale_ref[row, own][None]

        def of_tile(grid, signs, d):
            sums = [jnp.zeros((height, units), jnp.int32)] * limbs
            selectors = _selectors(grid, signs, codes_ref, interpret)
            for word, selector in enumerate(selectors):
                sums = add_dot(sums, _pick(selector, interpret), words[word], interpret)
            scale = (0.5 + (signs >> 28).astype(jnp.float32)) * 0.25 * x_scale
            found = total([sums[0] * 256 + sums[1], *sums[2:]])
            return found * (d.astype(jnp.float32) * scale)

        return of_tile

    zero = jnp.zeros((height, units), jnp.float32)
    # Ahead it is 0.7 us faster, and takes ten times as long to compile.
    sums = in_turn(load, product, groups // units, [zero] * len(tiles), ahead=False)
    return [jnp.sum(so_far, -1) for so_far in sums]


def _selectors(grid: Array, signs: Array, codes_ref: Any, interpret: bool):
    """Yield what picks each four weights of groups: code and sign in four nibbles."""
    signs = (signs & 0x0FFFFFFF) ^ (signs << 4)
    even, odd = signs & 0x55555555, signs & np.uint32(0xAAAAAAAA)
    for j, negative in enumerate((even << 2, odd << 1, even, odd >> 1)):
        codes = codes_ref[_byte(grid, j, interpret)].astype(jnp.uint32) * _SPREAD
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
        found = assembly("prmt.b32 $0, 0x002B1908, 0x00D5E7F8, $1;", selector)
        return jax.lax.bitcast_convert_type(found, jnp.uint32)
    nibble = selector[..., None] >> 4 * jnp.arange(4, dtype=jnp.uint32)
    code = nibble & 3
    magnitude = jnp.where(code == 0, 8, jnp.where(code == 1, 25, 43))
    signed = jnp.where(nibble & 4 > 0, -magnitude, magnitude)
    return jax.lax.bitcast_convert_type(signed.astype(jnp.int8), jnp.uint32)
