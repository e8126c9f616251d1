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

_LEVELS = np.unique(IQ2_GRID)
_CODES = (np.searchsorted(_LEVELS, IQ2_GRID) << np.arange(0, 16, 2)).sum(1, np.uint32)


def serves(*weights: Weight) -> bool:
    """Say whether `product` multiplies these weights."""
    whole = lambda size: size & (size - 1) == 0  # noqa: E731
    return all(
        isinstance(w, QuantTensor)
        and w.format in FORMATS
        and all(map(whole, w.shape[1:]))
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
    weights: Sequence[QuantTensor],
    tiles: Tiles,
    dtype: str,
    finish: Callable[..., Array] | None = None,
    *,
    is_sorted: bool = False,
    interpret: bool = False,
    shape: tuple[int, int, int, int] | None = None,
    together: int = 1,
) -> Float[Array, "P Out"]:
    """Return `finish` of the products of each place of tiles with its expert's weights.

    Args:
      x: the rows that `tiles.source` names, or if `is_sorted` one for each place.
      weights: [E, Out, In] of one of FORMATS, all of the same.
      tiles: of `sort`.
      dtype: of the result; operands are bfloat16.
      finish: makes one result of several weights'.
      is_sorted: see `x`.
      interpret: without a GPU.
    """
    bn, units, warps, stages = shape or (128 // len(weights), 64, 8, 3)
    format = _FORMATS[weights[0].format]
    n = weights[0].shape[1]
    x = format.arrange(x.astype(jnp.bfloat16))
    tile = len(tiles.source) // len(tiles.expert)
    units, bn = min(units, x.shape[2]), min(bn, n)
    operands = [format.operands(w) for w in weights]
    return pl.pallas_call(
        functools.partial(
            _kernel, bn=bn, units=units, tile=tile, format=format, finish=finish,
            gather=not is_sorted, weights=len(weights), together=together,
        ),
        grid=(n // bn, len(tiles.expert)),
        out_shape=jax.ShapeDtypeStruct((len(tiles.source), n), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"expert_tiles_{weights[0].format.lower()}_{len(weights)}x{n}",
    )(tiles.count, tiles.expert, tiles.source, x, *sum(operands, []))  # fmt: skip


def _kernel(
    count_ref,  # [1]
    expert_ref,  # [tiles]
    source_ref,  # [P]
    x_ref,  # [R, planes, units of a row]
    *refs,  # of the operands of each weight, and of the output [P, Out]
    bn, units, tile, format, finish, gather, weights, together,
):  # fmt: skip
    *refs, out_ref = refs
    each = len(refs) // weights
    column, number = pl.program_id(0), pl.program_id(1)

    @pl.when(number < count_ref[0])
    def _multiply():
        rows = pl.ds(number * tile, tile)
        expert = expert_ref[number]
        places = (column * bn + jnp.arange(bn))[:, None]
        source = number * tile + jnp.arange(tile)
        if gather:
            source = source_ref[rows]

        def add(step, sums):
            columns = step * units + jnp.arange(units)[None]
            decoded = [
                format.decode(refs[i * each : (i + 1) * each], expert, places, columns)
                for i in range(weights)
            ]
            size = x_ref.shape[1] // len(decoded[0])
            for section, values in enumerate(zip(*decoded, strict=True)):

                def add_planes(index, sums, section=section, values=values):
                    for number in range(together):
                        plane = index * together + number
                        x = x_ref[source[:, None], section * size + plane, columns]
                        sums = tuple(
                            total + _dot(x, value(plane).astype(jnp.bfloat16))
                            for total, value in zip(sums, values, strict=True)
                        )
                    return sums

                sums = jax.lax.fori_loop(0, size // together, add_planes, sums)
            return sums

        zero = jnp.zeros((tile, bn), jnp.float32)
        sums = jax.lax.fori_loop(0, x_ref.shape[2] // units, add, (zero,) * weights)
        result = (finish(*sums) if finish else sums[0]).astype(out_ref.dtype)
        out_ref[rows, pl.ds(column * bn, bn)] = result


def _dot(x, w):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


class _Format(NamedTuple):
    """How a kernel reads one ggml type.

    Attributes:
      arrange: brings rows [R, In] to [R, planes, units].
      operands: arrays of a weight.
      decode: of their refs, an expert, rows [bn, 1] and units [1, bu], for each section
        of planes a function of a plane's number in it that gives values [bn, bu].
    """

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
    return _Format(_arrange_k(bits), operands, decode)


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
    first, second, third = (np.float32(level).view(np.uint32) for level in _LEVELS)

    def section(four):
        codes = codes_ref[((grid >> (8 * four)) & 255).astype(jnp.int32)]
        seven = (signs >> (7 * four)) & 127
        parity = seven ^ (seven >> 4)
        parity = parity ^ (parity >> 2)
        negative = seven | ((parity ^ (parity >> 1)) & 1) << 7

        def value(place):
            place = place.astype(jnp.uint32)
            code = (codes >> (2 * place)) & 3
            size = jnp.where(code == 0, first, jnp.where(code == 1, second, third))
            bits = size ^ (negative >> place << 31)
            return jax.lax.bitcast_convert_type(bits, jnp.float32) * scale

        return value

    return [section(four) for four in range(4)]


_FORMATS = {
    "Q2_K": _k_format(2, ("scales",), _read_q2_k),
    "Q4_K": _k_format(4, ("scales", "mins"), _read_q4_k),
    "IQ2_XXS": _Format(_arrange_iq2, _iq2_operands, _decode_iq2),
}

FORMATS = tuple(_FORMATS)
"""The ggml types that `product` multiplies."""
