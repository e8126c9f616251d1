"""Products of many rows with the experts they chose, on NVIDIA GPUs.

The pairs of a row and an expert are sorted by expert and each expert's cut into tiles,
whose last is filled up.  A program takes a tile and some rows of its expert's weight,
which it decodes from their planes: packed weights are all that is read, and no copy of
them is made.  A sum does not mind the order of what it sums: columns are taken in the
order in which a shift brings them out of words, and the operand is brought into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.pallas.passes import Weight
from ds4jax.quant import QuantTensor

TILE = 128
"""Rows of a tile, all of one expert."""

_OUT = 64
"""Rows of a weight that a program takes."""

_LEVELS = np.unique(IQ2_GRID)
_CODES = (np.searchsorted(_LEVELS, IQ2_GRID) << np.arange(0, 16, 2)).sum(1, np.uint32)


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
    assert isinstance(w, QuantTensor)
    format = _FORMATS[w.format]
    x = format.arrange(x.astype(jnp.bfloat16))
    n, size = w.shape[1], x.shape[2]
    bn, units = min(_OUT, n & -n), min(format.units, size & -size)
    return pl.pallas_call(
        functools.partial(
            _kernel, bn=bn, units=units, format=format, gather=not is_sorted
        ),
        grid=(n // bn, len(tiles.expert)),
        out_shape=jax.ShapeDtypeStruct((len(tiles.source), n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=format.stages),
        interpret=interpret,
        name=f"expert_tiles_{w.format.lower()}_{n}x{w.shape[2]}",
    )(tiles.count, tiles.expert, tiles.source, x, *format.operands(w))


def _kernel(
    count_ref,  # [1]
    expert_ref,  # [tiles]
    source_ref,  # [P]
    x_ref,  # [R, planes, units of a row]
    *refs,  # of the operands of the weight, and of the output [P, Out]
    bn, units, format, gather,
):  # fmt: skip
    *refs, out_ref = refs
    column, number = pl.program_id(0), pl.program_id(1)
    tile = source_ref.shape[0] // expert_ref.shape[0]

    @pl.when(number < count_ref[0])
    def _multiply():
        rows = pl.ds(number * tile, tile)
        source = source_ref[rows] if gather else number * tile + jnp.arange(tile)
        expert = expert_ref[number]
        places = (column * bn + jnp.arange(bn))[:, None]

        def add(step, total):
            columns = step * units + jnp.arange(units)[None]
            sections = format.decode(refs, expert, places, columns)
            size = x_ref.shape[1] // len(sections)
            for section, values in enumerate(sections):

                def add_planes(turn, total, section=section, values=values):
                    for plane in range(format.together):
                        plane += turn * format.together
                        x = x_ref[source[:, None], section * size + plane, columns]
                        total += _dot(x, values(plane).astype(jnp.bfloat16))
                    return total

                turns = size // format.together
                total = jax.lax.fori_loop(0, turns, add_planes, total)
            return total

        zero = jnp.zeros((tile, bn), jnp.float32)
        total = jax.lax.fori_loop(0, x_ref.shape[2] // units, add, zero)
        out_ref[rows, pl.ds(column * bn, bn)] = total


def _dot(x, w):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


class _Format(NamedTuple):
    """How a kernel reads one ggml type.

    Attributes:
      planes: values of a unit, which are columns as far apart as units are many.
      units, together, stages: what suits it: units that a program takes at a time,
        planes that it decodes before it waits for products, and loads in flight.
      arrange: brings rows [R, In] to [R, planes, units].
      operands: arrays of a weight.
      decode: of their refs, an expert, rows [bn, 1] and units [1, bu], for each section
        of planes a function of a plane's number in it that gives values [bn, bu].
    """

    planes: int
    units: int
    together: int
    stages: int
    arrange: Callable[[Array], Array]
    operands: Callable[[QuantTensor], list[Array]]
    decode: Callable[..., list[Callable[[Array], Array]]]


def _arrange_k(bits: int) -> Callable[[Array], Array]:
    """Return what arranges columns by their place in a word: level, then byte."""

    def arrange(x: Array) -> Array:
        words = x.reshape(len(x), -1, 8 // bits, 8, 4)
        return words.transpose(0, 2, 4, 1, 3).reshape(len(x), 32 // bits, -1)

    return arrange


def _k_format(bits: int, scales: Sequence[str], read: Callable) -> _Format:
    def decode(refs, expert, places, columns):
        quants_ref, d_ref, dmin_ref, *scale_refs = refs
        quants = quants_ref[expert, places, columns]
        block = columns // (quants_ref.shape[2] // d_ref.shape[2])
        d = d_ref[expert, places, block].astype(jnp.float32)
        dmin = dmin_ref[expert, places, block].astype(jnp.float32)

        def section(level, scale, least):
            scale, least = (
                d * scale.astype(jnp.float32),
                dmin * least.astype(jnp.float32),
            )

            def value(byte):
                shift = (8 * byte + bits * level).astype(jnp.uint32)
                level_of = (quants >> shift) & (2**bits - 1)
                return scale * level_of.astype(jnp.int32).astype(jnp.float32) - least

            return value

        found = read(scale_refs, expert, places, columns)
        return [section(level, *pair) for level, pair in enumerate(found)]

    names = ("quants", "d", "dmin", *scales)
    operands = lambda w: [w.planes[name] for name in names]  # noqa: E731
    return _Format(32 // bits, 64, 2, 2, _arrange_k(bits), operands, decode)


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


def _arrange_iq2(x: Array) -> Array:
    return x.reshape(len(x), -1, 32).swapaxes(1, 2)


def _iq2_operands(w: QuantTensor) -> list[Array]:
    planes = w.planes
    return [jnp.asarray(_CODES), planes["grid"], planes["signs"], planes["d"]]


def _decode_iq2(refs, expert, places, columns):
    codes_ref, grid_ref, signs_ref, d_ref = refs
    grid = grid_ref[expert, places, columns]
    signs = signs_ref[expert, places, columns]
    block = columns // (grid_ref.shape[2] // d_ref.shape[2])
    d = d_ref[expert, places, block].astype(jnp.float32)
    scale = d * (0.5 + (signs >> 28).astype(jnp.int32).astype(jnp.float32)) * 0.25
    # See `QuantTensor`: a sign is the parity of its bit and of those before it.
    negative = (signs & 0x0FFFFFFF) ^ (signs << 4)
    first, second, third = (np.float32(level).view(np.uint32) for level in _LEVELS)

    def section(four):
        codes = codes_ref[((grid >> (8 * four)) & 255).astype(jnp.int32)]

        def value(place):
            place = place.astype(jnp.uint32)
            code = (codes >> (2 * place)) & 3
            size = jnp.where(code == 0, first, jnp.where(code == 1, second, third))
            bits = size ^ (negative >> (4 * place + four) << 31)
            return jax.lax.bitcast_convert_type(bits, jnp.float32) * scale

        return value

    return [section(four) for four in range(4)]


_FORMATS = {
    "Q2_K": _k_format(2, ("scales",), _read_q2_k),
    "Q4_K": _k_format(4, ("scales", "mins"), _read_q4_k),
    "IQ2_XXS": _Format(32, 32, 1, 4, _arrange_iq2, _iq2_operands, _decode_iq2),
}

FORMATS = tuple(_FORMATS)
"""The ggml types that `product` multiplies."""
