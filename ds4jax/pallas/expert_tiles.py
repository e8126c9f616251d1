"""Products of many rows with the experts they chose, on NVIDIA GPUs.

The pairs of a row and an expert are sorted by expert and each expert's cut into tiles,
whose last is filled up.  A program takes a tile and some rows of its expert's weight,
which it decodes from their planes: packed weights are all that is read, and no copy of
them is made.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas.dense import divisor
from ds4jax.pallas.passes import Weight
from ds4jax.pallas.tile_formats import COLUMNS, FORMATS
from ds4jax.quant import QuantTensor

TILE = 128
"""Rows of a tile, all of one expert."""

_WIDTH = 128
"""Rows of a weight that a program takes."""

_WARPS = 8


def serves(*weights: Weight) -> bool:
    """Say whether `product` multiplies these weights."""

    return all(
        isinstance(w, QuantTensor) and w.format in FORMATS and w.shape[1] % 16 == 0
        for w in weights
    )


class Tiles(NamedTuple):
    """Pairs of rows and experts, sorted into tiles.

    Attributes:
      source: int32 [tiles * TILE]: the row at each place; any, where a tile is filled.
      expert: int32 [tiles]: of each tile.
      count: int32 [1]: how many tiles have pairs; the others follow.
      place: int32 [T, U]: where each pair went.
    """

    source: Int[Array, "P"]
    expert: Int[Array, "tiles"]
    count: Int[Array, "1"]
    place: Int[Array, "T U"]


def sort(chosen: Int[Array, "T U"], experts: int, tile: int = TILE) -> Tiles:
    """Sort the pairs of `chosen` by expert, as few tiles as hold them in any case."""
    pairs = chosen.size
    ids = chosen.reshape(-1)
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.bincount(ids, length=experts)
    tiles = -(-sizes // tile)
    ends, last = jnp.cumsum(sizes), jnp.cumsum(tiles)
    # Place of each pair in sorted order: its expert's first tile, and on from there.
    sorted_ids = ids[order]
    offset = jnp.arange(pairs) - (ends - sizes)[sorted_ids]
    places = (last - tiles)[sorted_ids] * tile + offset
    most = pairs // tile + min(experts, pairs)
    source = jnp.zeros(most * tile, jnp.int32)
    source = source.at[places].set((order // chosen.shape[1]).astype(jnp.int32))
    place = jnp.zeros(pairs, jnp.int32).at[order].set(places.astype(jnp.int32))
    expert = jnp.searchsorted(last, jnp.arange(most), side="right")
    return Tiles(
        source,
        jnp.minimum(expert, experts - 1).astype(jnp.int32),
        last[-1:].astype(jnp.int32),
        place.reshape(chosen.shape),
    )


def product(
    x: Float[Array, "R In"],
    w: Weight,
    tiles: Tiles,
    *,
    is_sorted: bool = False,
    interpret: bool = False,
) -> Float[Array, "P Out"]:
    """Return the product of each place of tiles with its expert's weight, float32.

    Args:
      x: the rows that `tiles.source` names, or if `is_sorted` one for each place.
      w: [E, Out, In] of one of FORMATS.
      tiles: of `sort`.
      is_sorted: see `x`.
      interpret: without a GPU.

    The operands are bfloat16.  Places of tiles after the last have undefined results.
    """
    assert isinstance(w, QuantTensor)
    return _products(x, [w], tiles, None, is_sorted, interpret)


def gated(
    x: Float[Array, "R In"],
    gate: Weight,
    up: Weight,
    tiles: Tiles,
    activation: Callable[[Array, Array], Array],
    *,
    interpret: bool = False,
) -> Float[Array, "P Out"]:
    """Return `activation` of two products as of `product`, in bfloat16.

    Args:
      x: the rows that `tiles.source` names.
      gate, up: [E, Out, In], each of one of FORMATS.
      tiles: of `sort`.
      activation: elementwise.
      interpret: without a GPU.
    """
    assert isinstance(gate, QuantTensor) and isinstance(up, QuantTensor)
    pair = [gate, up]
    if gate.format == up.format == "IQ2_XXS":
        return _products(x, pair, tiles, activation, False, interpret)
    # A program that decodes others has no registers for two.
    found = (product(x, w, tiles, interpret=interpret) for w in pair)
    return activation(*found).astype(jnp.bfloat16)


def _products(
    x: Array,
    weights: Sequence[QuantTensor],
    tiles: Tiles,
    activation: Callable[[Array, Array], Array] | None,
    is_sorted: bool,
    interpret: bool,
) -> Array:
    """Return the product with one weight, or `activation` of those with two."""
    name, n = weights[0].format, weights[0].shape[1]
    format = FORMATS[name]
    x = format.arrange(x.astype(jnp.bfloat16))
    bn = divisor(n, _WIDTH)
    return pl.pallas_call(
        functools.partial(
            _kernel, bn=bn, format=format, gather=not is_sorted, activation=activation,
            interpret=interpret,
        ),
        grid=(n // bn, len(tiles.expert)),
        out_shape=jax.ShapeDtypeStruct(
            (len(tiles.source), n), jnp.bfloat16 if activation else jnp.float32
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=_WARPS, num_stages=1 if format.ahead else 2
        ),
        interpret=interpret,
        name=f"expert_tiles_{name.lower()}_{len(weights)}x{n}x{x.shape[1]}",
    )(tiles.count, tiles.expert, tiles.source, x,
      *itertools.chain(*map(format.operands, weights)))  # fmt: skip


def _kernel(
    count_ref,  # [1]
    expert_ref,  # [tiles]
    source_ref,  # [P]
    x_ref,  # [R, In]
    *refs,  # of the operands of each weight, and of the output [P, Out]
    bn, format, gather, activation, interpret,
):  # fmt: skip
    *refs, out_ref = refs
    half = len(refs) // 2
    weights = [refs[:half], refs[half:]] if activation else [refs]
    column, number = pl.program_id(0), pl.program_id(1)
    tile = source_ref.shape[0] // expert_ref.shape[0]
    steps = x_ref.shape[1] // COLUMNS

    @pl.when(number < count_ref[0])
    def _multiply():
        rows, own = pl.ds(number * tile, tile), pl.ds(column * bn, bn)
        source = source_ref[rows] if gather else number * tile + jnp.arange(tile)
        expert, places = expert_ref[number], column * bn + jnp.arange(bn)

        def load(step):
            return [format.load(planes, expert, places, step) for planes in weights]

        def multiply(step, totals, packed):
            columns = step * COLUMNS + jnp.arange(COLUMNS)
            x = x_ref[source[:, None], columns[None]]
            # Both are decoded before a product is waited for.
            decoded = [
                format.decode(planes, parts, interpret)
                for planes, parts in zip(weights, packed, strict=True)
            ]
            pairs = zip(totals, decoded, strict=True)
            return [total + _dot(x, w) for total, w in pairs]

        def ahead(step, state):
            totals, packed = state
            following = load(jnp.minimum(step + 1, steps - 1))
            return multiply(step, totals, packed), following

        totals = [jnp.zeros((tile, bn), jnp.float32)] * len(weights)
        if format.ahead:
            totals, _ = jax.lax.fori_loop(0, steps, ahead, (totals, load(0)))
        else:
            at_once = lambda step, totals: multiply(step, totals, load(step))  # noqa: E731
            totals = jax.lax.fori_loop(0, steps, at_once, totals)
        out = activation(*totals) if activation else totals[0]
        out_ref[rows, own] = out.astype(out_ref.dtype)


def _dot(x, w):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
