"""Products of rows with the experts they chose, on NVIDIA GPUs.

A program takes some rows of one expert's weight, or of all that a row chose, and one
row of activations.  Programs run in the order of the weight's rows, so what two rows
read of one expert lies in the cache for the second.  A sum has one order, fixed by the
weight's shape alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas import iq2_xxs, k_quants
from ds4jax.pallas.dense import divisor
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, Order, shapes, store
from ds4jax.pallas.passes import Weight
from ds4jax.quant import QuantTensor


class Experts(NamedTuple):
    """The weights of one expert, or of a stack of them.

    Attributes:
      gate, up: [*E, F, In].
      down: [*E, Out, F].
    """

    gate: Weight
    up: Weight
    down: Weight


def packed(weights: Experts) -> tuple[QuantTensor, QuantTensor, QuantTensor]:
    """Return gate, up and down, all of which have to be quantised."""
    gate, up, down = weights
    assert isinstance(gate, QuantTensor) and isinstance(up, QuantTensor)
    assert isinstance(down, QuantTensor)
    return gate, up, down


@dataclasses.dataclass(frozen=True)
class Format:
    """How a ggml type is multiplied.

    Attributes:
      order: of the activations.
      activations, planes, multiply: as in `k_quants` and `iq2_xxs`.
      warps: of a program of `weighed`; a tile has a row for each of them.
      tiles: that it takes at a time for one row, and twice as many for more.
      gated_warps: of a program of `gated`.
      gated_tiles: that it takes of gate and of up at a time; more want more registers.
    """

    order: Order
    activations: Callable[[FixedPoint], list[Array]]
    planes: Callable[[QuantTensor], list[Array]]
    multiply: Callable[..., list[Array]]
    warps: int
    tiles: int
    gated_warps: int
    gated_tiles: int


def _read_by_chunk(at, refs, chunk):
    return [at(ref, chunk) for ref in refs]


def _read_by_group(at, refs, chunk):
    return [at(ref, chunk // 2 * 2 + level) for level in range(2) for ref in refs]


def _k_quant(
    bits: int,
    read: Callable,
    unpack: Callable,
    scales: tuple[str, ...],
    program: tuple[int, int, int, int],
) -> Format:
    return Format(
        Order(levels=8 // bits),
        k_quants.activations,
        functools.partial(k_quants.planes, scales=scales),
        functools.partial(k_quants.multiply, bits=bits, read=read, unpack=unpack),
        *program,
    )


FORMATS = {
    "Q8_0": _k_quant(8, _read_by_chunk, lambda scales: [(1, 0)], (), (4, 1, 16, 2)),
    "Q2_K": _k_quant(
        2, _read_by_chunk, k_quants.unpack_q2_k, ("dmin", "scales"), (4, 2, 8, 4)
    ),
    "Q4_K": _k_quant(
        4,
        _read_by_group,
        k_quants.unpack_q4_k,
        ("dmin", "scales", "mins"),
        (4, 2, 8, 4),
    ),
    "IQ2_XXS": Format(
        Order(by_word=True),
        iq2_xxs.activations,
        iq2_xxs.planes,
        iq2_xxs.multiply,
        warps=8,
        tiles=2,
        gated_warps=8,
        gated_tiles=2,
    ),
}
"""The ggml types that are multiplied here."""


@functools.partial(jax.jit, static_argnames=("width", "interpret"))
def weighed(
    x: FixedPoint,
    w: QuantTensor,
    expert_ids: Int[Array, "R U"],
    share: Float[Array, "R U"],
    width: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "R Out"]:
    """Return the weighed products of each row's U vectors with its experts, added up.

    Args:
      x: R * U vectors of In, in the order of the format.
      w: [E, Out, In], of one of FORMATS.
      expert_ids: of each row.
      share: of each product.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.  All if not given.
      interpret: without a GPU.
    """
    format = FORMATS[w.format]
    assert x.order == format.order
    n = w.shape[1]
    rows, each = expert_ids.shape
    width = width or rows
    height = divisor(n, format.warps)
    tiles = divisor(n // height, format.tiles * min(width, 2))
    operands = format.activations(x), format.planes(w)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            multiply=format.multiply,
            count=len(operands[0]),
            tiles=tiles,
            height=height,
            interpret=interpret,
        ),
        grid=(width, n // (height * tiles)),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=format.warps),
        interpret=interpret,
        name=f"{w.format.lower()}_{width * each}x{n}x{w.shape[-1]}",
    )(expert_ids, share, *operands[0], *operands[1])


def _kernel(
    ids_ref,  # [R, U]
    share_ref,  # [R, U]
    *refs,  # of the activations, of the weight; out [R, N]
    multiply, count, tiles, height, interpret,
):  # fmt: skip
    x, w, out_ref = refs[:count], refs[count:-1], refs[-1]
    row, first = pl.program_id(0), pl.program_id(1) * tiles * height
    firsts = [first + height * tile for tile in range(tiles)]
    each = ids_ref.shape[1]
    # Three together are 2 to 4 % faster, and take three times as long to compile.
    at_once = 2 - each % 2

    def add(step, sums):
        for slot in range(at_once):
            number = step * at_once + slot
            found = multiply(
                x, [(w, at) for at in firsts], row * each + number,
                ids_ref[row, number], height, interpret,
            )  # fmt: skip
            share = share_ref[row, number]
            sums = [s + share * f for s, f in zip(sums, found, strict=True)]
        return sums

    sums = [jnp.zeros(height, jnp.float32)] * tiles
    sums = jax.lax.fori_loop(0, each // at_once, add, sums)
    own = [pl.ds(at, height) for at in firsts]

    def write(to):
        for at, values in zip(own, sums, strict=True):
            out_ref[to, at] = values

    write(row)
    width = pl.num_programs(0)
    if out_ref.shape[0] > width:

        @pl.when(row == width - 1)
        def _copy():
            for copy in range(width, out_ref.shape[0]):
                write(copy)


@functools.partial(
    jax.jit,
    static_argnames=("activation", "dtype", "order", "width", "interpret", "warps"),
)
def gated(
    x: FixedPoint,
    gate: QuantTensor,
    up: QuantTensor,
    expert_ids: Int[Array, "R U"],
    activation: Callable[[Array, Array], Array],
    dtype: str,
    order: Order,
    width: int | None = None,
    *,
    interpret: bool = False,
    warps: int | None = None,
) -> FixedPoint:
    """Return `activation(gate x, up x)` of each row and each expert it chose.

    Args:
      x: R rows of In, in the order of the format.
      gate, up: [E, F, In], of one of FORMATS.
      expert_ids: of each row.
      activation: elementwise.
      dtype: operand type of what the result is to be multiplied by.
      order: of the result.
      width: for how many of the R rows to compute; there is nothing in the others'
        places.  All if not given.
      interpret: without a GPU.
      warps: of a program; by the format if not given.

    Returns:
      R * U rows of F.
    """
    format = FORMATS[gate.format]
    assert gate.format == up.format and x.order == format.order
    n = gate.shape[1]
    rows, each = expert_ids.shape
    warps = warps or format.gated_warps
    own = (width or rows) * each
    operands = format.activations(x), format.planes(gate), format.planes(up)
    found = pl.pallas_call(
        functools.partial(
            _gated_kernel,
            multiply=format.multiply,
            counts=[len(part) for part in operands],
            height=warps,
            at_once=min(format.gated_tiles, GROUP // warps),
            each=each,
            activation=activation,
            dtype=dtype,
            order=order,
            interpret=interpret,
        ),
        grid=(own, n // GROUP),
        out_shape=shapes(rows * each, n, dtype, order),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name=f"{gate.format.lower()}_gated_{own}x{n}x{gate.shape[-1]}",
    )(expert_ids.reshape(-1), *(array for part in operands for array in part))
    return FixedPoint(*found, order=order)


def _gated_kernel(
    ids_ref,  # [P]
    *refs,  # of the activations, of gate, of up; of the result
    multiply, counts, height, at_once, each, activation, dtype, order, interpret,
):  # fmt: skip
    refs = iter(refs)
    x, gate, up = ([next(refs) for _ in range(count)] for count in counts)
    pair, group = pl.program_id(0), pl.program_id(1)
    row, expert = pair // each, ids_ref[pair]
    tiles = jnp.arange(GROUP // height)[:, None]

    def turn(step, found):
        places = [step * at_once + place for place in range(at_once)]
        firsts = [group * GROUP + place * height for place in places]
        own = [(w, first) for w in (gate, up) for first in firsts]
        values = multiply(x, own, row, expert, height, interpret)
        for number, value in enumerate(values):
            which, place = divmod(number, at_once)
            mine = tiles == places[place]
            found[which] = jnp.where(mine, value[None], found[which])
        return found

    zero = jnp.zeros((len(tiles), height), jnp.float32)
    found = jax.lax.fori_loop(0, len(tiles) // at_once, turn, [zero, zero])
    x = activation(*found).reshape(1, 2, 4, 4)
    store(list(refs), x, pair, group, dtype, order)
