"""Products of many rows with the experts they chose, on NVIDIA GPUs.

The pairs of a row and an expert are sorted by expert and each expert's cut into tiles,
whose last is filled up.  A program takes a tile and some rows of its expert's weight,
which it decodes from their planes: packed weights are all that is read, and no copy of
them is made.  A sum does not mind the order of what it sums: columns are taken in the
order in which a shift brings them out of words, and the operand is brought into it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.pallas.fixed_point import assembly
from ds4jax.pallas.passes import Weight
from ds4jax.quant import QuantTensor

TILE = 128
"""Rows of a tile, all of one expert."""

_LEVELS = np.unique(IQ2_GRID)
_CODES = (np.searchsorted(_LEVELS, IQ2_GRID) << np.arange(0, 32, 4)).sum(1, np.uint32)
"""Of the grid's rows, the place of weight i's level in nibble i."""


def serves(*weights: Weight) -> bool:
    """Say whether `product` multiplies these weights."""

    def is_served(w: Weight) -> bool:
        if not isinstance(w, QuantTensor) or w.format not in FORMATS:
            return False
        sizes = w.shape[1], w.shape[2] // _FORMATS[w.format].planes
        return all(size % 16 == 0 for size in sizes)

    return all(map(is_served, weights))


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


def _products(x, weights, tiles, activation, is_sorted, interpret):
    name, (n, k) = weights[0].format, weights[0].shape[1:]
    format = _FORMATS[name]
    x = format.arrange(x.astype(jnp.bfloat16))
    units = k // format.planes
    bn, units = (
        min(format.rows // len(weights), n & -n),
        min(format.units, units & -units),
    )
    return pl.pallas_call(
        functools.partial(
            _kernel, bn=bn, units=units, format=format, gather=not is_sorted,
            activation=activation, interpret=interpret,
        ),
        grid=(n // bn, len(tiles.expert)),
        out_shape=jax.ShapeDtypeStruct(
            (len(tiles.source), n), jnp.bfloat16 if activation else jnp.float32
        ),
        compiler_params=plgpu.CompilerParams(
            num_warps=format.warps, num_stages=format.stages
        ),
        interpret=interpret,
        name=f"expert_tiles_{name.lower()}_{len(weights)}x{n}x{k}",
    )(tiles.count, tiles.expert, tiles.source, x,
      *itertools.chain(*zip(*map(format.operands, weights), strict=True)))  # fmt: skip


def _kernel(
    count_ref,  # [1]
    expert_ref,  # [tiles]
    source_ref,  # [P]
    x_ref,  # [R, In]
    *refs,  # of the operands of each weight, and of the output [P, Out]
    bn, units, format, gather, activation, interpret,
):  # fmt: skip
    *refs, out_ref = refs
    weights = [refs] if activation is None else [refs[::2], refs[1::2]]
    column, number = pl.program_id(0), pl.program_id(1)
    tile = source_ref.shape[0] // expert_ref.shape[0]

    @pl.when(number < count_ref[0])
    def _multiply():
        rows, own = pl.ds(number * tile, tile), pl.ds(column * bn, bn)
        source = source_ref[rows] if gather else number * tile + jnp.arange(tile)
        expert, places = expert_ref[number], (column * bn + jnp.arange(bn))[:, None]

        def add(step, totals):
            at = expert, places, step * units + jnp.arange(units)[None]
            return [
                format.add(total, x_ref, source[:, None], step, planes, at, interpret)
                for total, planes in zip(totals, weights, strict=True)
            ]

        zero = jnp.zeros((tile, bn), jnp.float32)
        steps = x_ref.shape[1] // (format.planes * units)
        totals = jax.lax.fori_loop(0, steps, add, [zero] * len(weights))
        out = activation(*totals) if activation else totals[0]
        out_ref[rows, own] = out.astype(out_ref.dtype)


def _dot(x, w):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


class _Format(NamedTuple):
    """How a kernel multiplies by one ggml type.

    Attributes:
      planes: values of a unit, which is a word of quants or of the grid.
      units, rows, warps, stages: what suits it: units and rows of the weight that a
        program takes at a time, its warps, and loads in flight.
      arrange: brings rows [R, In] into the order in which `add` takes their columns.
      operands: arrays of a weight.
      add: given a total [tile, bn], the ref of arranged rows, which of them [tile, 1],
        the step, refs of a weight's operands, an expert with rows [bn, 1] and units
        [1, bu] of that step, and whether it is interpreted, returns the total with the
        product.
    """

    planes: int
    units: int
    rows: int
    warps: int
    stages: int
    arrange: Callable[[Array], Array]
    operands: Callable[[QuantTensor], list[Array]]
    add: Callable[..., Array]


def _arrange_k(bits: int) -> Callable[[Array], Array]:
    """Return what arranges columns by their place in a word: level, then byte."""

    def arrange(x: Array) -> Array:
        words = x.reshape(len(x), -1, 8 // bits, 8, 4)
        return words.transpose(0, 2, 4, 1, 3).reshape(x.shape)

    return arrange


def _k_format(bits: int, scales: Sequence[str], read: Callable) -> _Format:
    def add(total, x_ref, source, step, refs, at, interpret):
        del step, interpret
        expert, places, columns = at
        quants_ref, d_ref, dmin_ref, *scale_refs = refs
        quants = quants_ref[at]
        block = columns // (quants_ref.shape[2] // d_ref.shape[2])
        d = d_ref[expert, places, block].astype(jnp.float32)
        dmin = dmin_ref[expert, places, block].astype(jnp.float32)

        for level, pair in enumerate(read(scale_refs, *at)):
            scale, least = (part.astype(jnp.float32) for part in pair)
            scale, least = d * scale, dmin * least

            def add_two(turn, total, level=level, scale=scale, least=least):
                # Both are decoded before products are waited for.
                for byte in (2 * turn, 2 * turn + 1):
                    shift = (8 * byte + bits * level).astype(jnp.uint32)
                    quant = ((quants >> shift) & (2**bits - 1)).astype(jnp.int32)
                    w = scale * quant.astype(jnp.float32) - least
                    plane = (4 * level + byte) * quants_ref.shape[2]
                    x = x_ref[source, plane + columns]
                    total += _dot(x, w.astype(jnp.bfloat16))
                return total

            total = jax.lax.fori_loop(0, 2, add_two, total)
        return total

    names = ("quants", "d", "dmin", *scales)
    operands = lambda w: [w.planes[name] for name in names]  # noqa: E731
    return _Format(32 // bits, 64, 64, 4, 2, _arrange_k(bits), operands, add)


def _read_q2_k(refs, expert, places, columns):
    (ref,) = refs
    packed = ref[expert, places, columns // 4].astype(jnp.int32)
    return [
        ((packed >> (8 * level)) & 15, (packed >> (8 * level + 4)) & 15)
        for level in range(4)
    ]


def _read_q4_k(refs, expert, places, columns):
    at = lambda level: (expert, places, columns // 8 * 2 + level)  # noqa: E731
    return [
        tuple(ref[at(level)].astype(jnp.int32) for ref in refs) for level in range(2)
    ]


def _iq2_operands(w: QuantTensor) -> list[Array]:
    planes = w.planes
    return [jnp.asarray(_CODES), planes["grid"], planes["signs"], planes["d"]]


def _add_iq2(total, x_ref, source, step, refs, at, interpret):
    expert, places, columns = at
    codes_ref, grid_ref, signs_ref, d_ref = refs
    grid, signs = grid_ref[at], signs_ref[at]
    block = columns // (grid_ref.shape[2] // d_ref.shape[2])
    d = d_ref[expert, places, block].astype(jnp.float32)
    scale = d * (0.5 + (signs >> 28).astype(jnp.int32).astype(jnp.float32)) * 0.25
    # See `QuantTensor`: a sign is the parity of its bit and of those before it.
    negative = (signs & 0x0FFFFFFF) ^ (signs << 4)
    values = []
    for four in range(4):
        codes = codes_ref[((grid >> (8 * four)) & 255).astype(jnp.int32)]
        selector = codes | (negative >> four & 0x11111111) << 2
        for half in (selector, selector >> 16):
            values += _four_values(half, scale, interpret)
    w = _interleaved(values)
    own = step * w.shape[1] + jnp.arange(w.shape[1])[None]
    return total + _dot(x_ref[source, own], w)


def _four_values(selector: Array, scale: Array, interpret: bool) -> list[Array]:
    """Return weights in bfloat16, whose levels and signs four nibbles say."""
    if interpret:
        nibbles = [selector >> (4 * place) for place in range(4)]
        one, two, three = (float(level) for level in _LEVELS)
        size = lambda code: jnp.where(code == 0, one, jnp.where(code == 1, two, three))  # noqa: E731
        sign = lambda nibble: jnp.where(nibble & 4 > 0, -1, 1)  # noqa: E731
        return [
            (sign(nibble) * size(nibble & 3) * scale).astype(jnp.bfloat16)
            for nibble in nibbles
        ]
    # The two bytes of 8, 25 and 43 as bfloat16, and of -8, -25 and -43.
    low = assembly("prmt.b32 $0, 0x002CC800, 0x002CC800, $1;", selector)
    high = assembly("prmt.b32 $0, 0x00424141, 0x00C2C1C1, $1;", selector)
    # In two parts, so that only the product is rounded.
    upper = scale.astype(jnp.bfloat16)
    lower = (scale - upper.astype(jnp.float32)).astype(jnp.bfloat16)
    multiply = (
        "{ .reg .b32 w, t; prmt.b32 w, $1, $2, %s; mul.rn.bf16x2 t, w, $4;"
        " fma.rn.bf16x2 $0, w, $3, t; }"
    )
    found = []
    for pick in ("0x5140", "0x7362"):
        pair = assembly(multiply % pick, low, high, _twice(upper), _twice(lower))
        pair = jax.lax.bitcast_convert_type(pair, jnp.uint32)
        for half in (pair, pair >> 16):
            half = half.astype(jnp.uint16)
            found.append(jax.lax.bitcast_convert_type(half, jnp.bfloat16))
    return found


def _twice(x: Array) -> Array:
    """Return words of twice a bfloat16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits * np.uint32(0x10001), jnp.int32)


def _interleaved(columns: list[Array]) -> Array:
    """Return [N, units * C] of C arrays [N, units], those of a unit side by side."""
    while len(columns) > 1:
        half = len(columns) // 2
        pairs = zip(columns[:half], columns[half:], strict=True)
        # Two at a time is what Triton joins.
        columns = [jnp.stack(pair, -1) for pair in pairs]
    return columns[0].reshape(len(columns[0]), -1)


_FORMATS = {
    "Q2_K": _k_format(2, ("scales",), _read_q2_k),
    "Q4_K": _k_format(4, ("scales", "mins"), _read_q4_k),
    "IQ2_XXS": _Format(32, 4, 128, 8, 2, lambda x: x, _iq2_operands, _add_iq2),
}

FORMATS = tuple(_FORMATS)
"""The ggml types that `product` multiplies."""
