"""Tiles of Q8_0, Q2_K and Q4_K weights times a row, within a kernel.

A thread takes chunks of 16 bytes, the values in them by levels: the bits 2 l and
2 l + 1 of Q2_K's bytes are half of group l of four.  A warp takes a row of a tile, so
what is read of the activations serves the tiles one after the other from registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from ds4jax.pallas.dense import divisor
from ds4jax.pallas.fixed_point import FixedPoint, dot, in_turn, total
from ds4jax.quant import QuantTensor

_CHUNKS = 32
"""That a program takes of a row at a time: one for each thread of a warp."""


def activations(x: FixedPoint) -> list[Array]:
    """Return the operands that `multiply` reads of the activations."""
    rows, limbs = x.words.shape[:2]
    levels = x.order.levels
    return [
        x.words.reshape(rows, limbs, levels, -1, 4),
        x.scale.reshape(rows, levels, -1),
        x.sums.reshape(rows, levels, -1),
    ]


def planes(w: QuantTensor, scales: Sequence[str]) -> list[Array]:
    """Return the operands that `multiply` reads of a weight."""
    quants = w.planes["quants"]
    return [
        quants.reshape(*quants.shape[:-1], -1, 4),
        *(w.planes[name] for name in ("d", *scales)),
    ]


def unpack_q2_k(scales: list[Array]) -> list[tuple[Array, Array]]:
    """Return the scale and the minimum of each level of Q2_K, from a word of both."""
    (packed,) = (word.astype(jnp.int32) for word in scales)
    return [
        ((packed >> (8 * level)) & 15, (packed >> (8 * level + 4)) & 15)
        for level in range(4)
    ]


def unpack_q4_k(scales: list[Array]) -> list[tuple[Array, Array]]:
    """Return the same of Q4_K, from a byte for each."""
    first, least, second, second_least = (byte.astype(jnp.int32) for byte in scales)
    return [(first, least), (second, second_least)]


def multiply(
    x: Sequence[Any],
    tiles: Sequence[tuple[Sequence[Any], Array]],
    row: Array,
    expert: Array,
    height: int,
    interpret: bool,
    *,
    bits: int,
    read: Callable[..., list[Array]],
    unpack: Callable[[list[Array]], list[tuple[Any, Any]]],
) -> list[Array]:
    """Return the products of tiles of an expert's rows with a row, float32 `[height]`.

    Args:
      x: refs of `activations`: words [R, limbs, levels, C, 4], scale
        [R, levels, C / 2], sums [R, levels, C].
      tiles: each the refs of `planes` of its weight, quants [E, N, C, 4] and the
        scales, and its first row.
      row: of the activations.
      expert: whose rows.
      height: rows of a tile.
      interpret: whether the kernel is interpreted.
      bits: of a value.
      read: what holds the format's scales, of chunks of a tile.
      unpack: that into each level's scale and minimum.
    """
    words_ref, scale_ref, sums_ref = x
    limbs, levels, chunks = words_ref.shape[1:4]
    units = divisor(chunks, _CHUNKS)

    def load(step):
        own = pl.ds(step * units, units)
        chunk = (step * units + jnp.arange(units))[None]

        def of_tile(refs, first):
            quants_ref, d_ref, *scale_refs = refs
            places = first + jnp.arange(height)[:, None]
            at = lambda ref, column: ref[expert, places, column]  # noqa: E731
            block = chunk // (chunks // d_ref.shape[2])
            quants = quants_ref[expert, pl.ds(first, height), own, :]
            blocks = [at(ref, block) for ref in (d_ref, *scale_refs[:1])]
            return quants, blocks, read(at, scale_refs[1:], chunk)

        return [of_tile(*tile) for tile in tiles]

    def product(step):
        own, group = pl.ds(step * units, units), step * units // 2
        groups = group + jnp.arange(units) // 2
        words = [
            [words_ref[row, limb, level, own, :][None] for limb in range(limbs)]
            for level in range(levels)
        ]
        scale = [scale_ref[row, level, groups][None] for level in range(levels)]
        sums = [sums_ref[row, level, own][None] for level in range(levels)]

        def of_tile(quants, blocks, scales):
            d, *dmin = (block.astype(jnp.float32) for block in blocks)
            product = minimum = jnp.zeros((height, units), jnp.float32)
            for level, (times, least) in enumerate(unpack(scales)):
                # Where a level's bits are is divided out of the sums, not the words.
                mask = np.uint32(0x01010101 * ((2**bits - 1) << bits * level))
                parts = dot(quants & mask, words[level], interpret, signed=bits == 8)
                parts = [(part >> bits * level) * times for part in parts]
                product += total(parts) * scale[level]
                if dmin:
                    minimum += least.astype(jnp.float32) * sums[level]
            return product * d - minimum * dmin[0] if dmin else product * d

        return of_tile

    zero = jnp.zeros((height, units), jnp.float32)
    # What is ahead of more levels leaves too few registers.
    sums = in_turn(load, product, chunks // units, [zero] * len(tiles), ahead=bits == 8)
    return [jnp.sum(so_far, -1) for so_far in sums]
