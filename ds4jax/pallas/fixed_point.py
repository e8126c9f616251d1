"""Activations as fixed-point numbers, so that integer units multiply them.

A GPU takes four products of bytes and their sum in one instruction (`dp4a`), which
leaves nothing to convert: the quants of every format are bytes as they are.  A row is
therefore cut into groups of 32, as Q8_0's are, each with a power of two for its scale
and two or three limbs, signed bytes.  Sums of a group are exact integers, so no order
of them can change a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

from ds4jax.pallas.dense import divisor

GROUP = 32
"""Values that share a scale."""

LIMBS = {"float32": 3, "bfloat16": 2}
"""Limbs by the type operands are to have.

A value is off by at most 2^-(8 limbs - 2) of the power of two above its group's
largest: 2^-22, next to a float32's own 2^-24; and 2^-14 for one already rounded to
bfloat16, of which nothing is lost down to a 64th of the largest.
"""


class Order(NamedTuple):
    """The order in which a format's kernel reads words, so that threads read runs.

    Attributes:
      levels: how many groups of weights share bytes; the first of each come first.
      by_word: all groups' first words come first, then all second ones.
    """

    levels: int = 1
    by_word: bool = False

    def place(self, group: Any, groups: int) -> Any:
        """Return where a group stands."""
        levels = self.levels
        return group % levels * (groups // levels) + group // levels


@struct.dataclass
@no_type_check
class FixedPoint:
    """Rows of fixed-point numbers: `scale` times the limbs read as one number.

    Groups are in the place that `order` gives them.

    Attributes:
      words: uint32 [R, limbs, G, 8], or [R, limbs, 8, G] `by_word`: 32 bytes of each
        group, the highest limb first.
      scale: float32 [R, G].
      sums: float32 [R, G, 2]: of the values themselves, in each half of a group.
      order: of the groups and words, static.
    """

    words: UInt32[Array, "R limbs _ _"]
    scale: Float[Array, "R G"]
    sums: Float[Array, "R G 2"]
    order: Order = struct.field(pytree_node=False, default=Order())


def shapes(
    rows: int, width: int, dtype: str, order: Order
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return what the arrays of a `FixedPoint` are, for kernels that write one."""
    groups = width // GROUP
    words = (8, groups) if order.by_word else (groups, 8)
    return (
        jax.ShapeDtypeStruct((rows, LIMBS[dtype], *words), jnp.uint32),
        jax.ShapeDtypeStruct((rows, groups), jnp.float32),
        jax.ShapeDtypeStruct((rows, groups, 2), jnp.float32),
    )


def blank(rows: int, width: int, dtype: str, order: Order) -> FixedPoint:
    """Return what stands for rows in fixed point where no kernel reads them."""
    words, scale, sums = (
        jnp.zeros(array.shape, array.dtype)
        for array in shapes(rows, width, dtype, order)
    )
    return FixedPoint(words, scale, sums, order)


def fix(
    x: Float[Array, "R In"],
    dtype: str,
    order: Order = Order(),  # noqa: B008
    norm: tuple[Float[Array, "In"], float] | None = None,
    *,
    interpret: bool = False,
) -> FixedPoint:
    """Return rows as fixed-point numbers, for products of operands of `dtype`.

    Args:
      x: the rows.
      dtype: one of LIMBS.
      order: of the groups and words.
      norm: weight and epsilon of an RMS norm to take first.
      interpret: without a GPU.
    """
    return _fix([x], lambda x: x, dtype, order, norm, interpret)


def fix_gated(
    gate: Float[Array, "R F"],
    up: Float[Array, "R F"],
    activation: Callable[[Array, Array], Array],
    dtype: str,
    *,
    interpret: bool = False,
) -> FixedPoint:
    """Return `fix(activation(gate, up), dtype)`, in one launch.

    Args:
      gate, up: the rows.
      activation: elementwise.
      dtype: one of LIMBS.
      interpret: without a GPU.
    """
    return _fix([gate, up], activation, dtype, Order(), None, interpret)


def _fix(arrays, of, dtype, order, norm, interpret):
    """Return `of(*arrays)`, elementwise, as fixed-point numbers."""
    rows, width = arrays[0].shape
    groups = width // GROUP
    at_once = divisor(groups, 8)
    shape = groups, 2, 4, 4
    norms, eps = [], None
    if norm:
        weight, eps = norm
        norms = [weight.reshape(shape)]
    return FixedPoint(
        *pl.pallas_call(
            functools.partial(
                _kernel, of=of, count=len(arrays), dtype=dtype, order=order,
                at_once=at_once, eps=eps,
            ),
            grid=(rows, groups // at_once),
            out_shape=shapes(rows, width, dtype, order),
            compiler_params=plgpu.CompilerParams(num_warps=1),
            interpret=interpret,
            name="fix",
        )(
            *(x.reshape(rows, *shape) for x in arrays),
            *norms,
        ),
        order=order,
    )  # fmt: skip


def _kernel(
    *refs,  # of the arrays [R, G, 2, 4, 4]: halves of a group, their words, the bytes
    # of a word; of a norm its weight [G, 2, 4, 4]; then of the arrays of `shapes`
    of, count, dtype, order, at_once, eps,
):  # fmt: skip
    arrays, others, found = refs[:count], refs[count:-3], refs[-3:]
    row, first = pl.program_id(0), pl.program_id(1) * at_once
    own = pl.ds(first, at_once)
    x = of(*(ref[row, own, :, :, :] for ref in arrays))
    if eps is not None:
        squares = jnp.square(of(*(ref[row, :, :, :, :] for ref in arrays)))
        mean = jnp.sum(squares.reshape(-1)) / squares.size
        x = x / jnp.sqrt(mean + eps) * others[0][own, :, :, :]
    store(found, x, row, first, dtype, order)


def store(
    refs: Sequence[Any],
    x: Float[Array, "N 2 4 4"],
    row: Array | int,
    first: Array | int,
    dtype: str,
    order: Order,
):
    """Write groups that a kernel has computed into their row.

    Args:
      refs: of the arrays of `shapes`.
      x: halves of groups, their words, the values of a word.
      row: where.
      first: of the groups, which follow each other.
      dtype: one of LIMBS.
      order: of the groups and words.
    """
    words_ref, scale_ref, sums_ref = refs
    place = order.place(first + jnp.arange(len(x)), scale_ref.shape[1])
    x = x.astype(dtype).astype(jnp.float32)
    power = power_above(jnp.max(jnp.max(jnp.max(jnp.abs(x), -1), -1), -1))
    for limb, words in enumerate(cut(x, power[:, None, None, None], LIMBS[dtype])):
        words, word = words.reshape(len(x), 8), jnp.arange(8)[None]
        if order.by_word:
            words_ref[row, limb, word, place[:, None]] = words
        else:
            words_ref[row, limb, place[:, None], word] = words
    scale_ref[row, place] = power / unit(LIMBS[dtype])
    half = jnp.arange(2)[None]
    sums_ref[row, place[:, None], half] = jnp.sum(jnp.sum(x, -1), -1)


def unit(limbs: int) -> float:
    """Return how many units of the last limb are a group's power of two."""
    return 2.0 ** (8 * limbs - 3)


def power_above(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the power of two of a group's scale.  Only within a kernel, as `cut`.

    Args:
      largest: magnitude of the group.
    """
    exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) & 0x7F800000
    # A group of zeros, or of numbers so small that their scale would not be normal.
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.maximum(power, 2.0**-100)


def cut(
    x: Float[Array, "*words 4"], power: Float[Array, "..."], limbs: int
) -> list[UInt32[Array, "*words"]]:
    """Return values as words of each limb, the highest first.

    Args:
      x: rounded to the type that operands are to have.
      power: of `power_above`, broadcast to `x`.
      limbs: how many.
    """
    scaled = x / power * unit(limbs)
    # Rounded half up: the same everywhere.
    value = jnp.floor(scaled + 0.5).astype(jnp.int32)
    place = 8 * jax.lax.broadcasted_iota(jnp.int32, value.shape, value.ndim - 1)
    found = []
    for _ in range(limbs):
        low = ((value + 128) & 255) - 128
        value = (value - low) >> 8
        words = jnp.sum((low & 255) << place, -1)
        found.append(jax.lax.bitcast_convert_type(words, jnp.uint32))
    return found[::-1]


def dot(
    w: UInt32[Array, "*shape N"],
    limbs: list[UInt32[Array, "*_ N"]],
    interpret: bool,
    signed: bool = True,
) -> list[Int[Array, "*shape"]]:
    """Return the sums of the products of N words with those of each limb.

    Only within a kernel.  The first two limbs come back as one number, the third by
    itself: the three as one would not fit.  A thread should have all N words.

    Args:
      w: of the weights, four bytes each.
      limbs: of the activations, broadcast to the shape of `w`.
      interpret: whether the kernel is interpreted, which has no such instruction.
      signed: whether the weights' bytes are.
    """
    count = w.shape[-1]
    words = [
        [word.reshape(array.shape[:-1]) for word in jnp.split(array, count, axis=-1)]
        for array in (w, *limbs)
    ]
    sums = [jnp.zeros(w.shape[:-1], jnp.int32) for _ in limbs]
    # One after the other: the sum is an operand of the next instruction.
    for word, *x in zip(*words, strict=True):
        sums = add_dot(sums, word, x, interpret, signed)
    high, low, *rest = sums
    return [high * 256 + low, *rest]


def add_dot(
    sums: list[Int[Array, "..."]],
    w: UInt32[Array, "..."],
    limbs: list[UInt32[Array, "..."]],
    interpret: bool,
    signed: bool = True,
) -> list[Int[Array, "..."]]:
    """Return `sums`, one for each limb, with the products of a word's bytes added.

    The other arguments are those of `dot`.
    """
    if interpret:
        of_weight = _bytes(w, jnp.int8 if signed else jnp.uint8)
        products = [of_weight * _bytes(x, jnp.int8) for x in limbs]
        return [s + jnp.sum(p, -1) for s, p in zip(sums, products, strict=True)]
    code = f"dp4a.{'s32' if signed else 'u32'}.s32 $0, $1, $2, $3;"
    return [assembly(code, w, x, so_far) for so_far, x in zip(sums, limbs, strict=True)]


def total(parts: list[Int[Array, "..."]]) -> Float[Array, "..."]:
    """Return sums of what `dot` gives as float32, in units of the scale."""
    value = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        value = value * 256 + part.astype(jnp.float32)
    return value


def in_turn(
    load: Callable[[Any], list[Any]],
    product: Callable[[Any], Callable[..., Array]],
    steps: int,
    sums: list[Array],
    *,
    ahead: bool,
) -> list[Array]:
    """Return `sums` with the products of all steps added.  Only within a kernel.

    What is read of all tiles is on its way before anything is computed of a step.

    Args:
      load: from a step to what is read of the weight's tiles.
      product: from a step to the product of what is read of a tile.
      steps: how many.
      sums: of each tile.
      ahead: whether it is on its way during the step before, which takes registers.
    """

    def add(step, sums, loaded):
        of_tile = product(step)
        return [s + of_tile(*tile) for s, tile in zip(sums, loaded, strict=True)]

    if not ahead:
        return jax.lax.fori_loop(0, steps, lambda i, s: add(i, s, load(i)), sums)

    def turn(step, carry):
        sums, loaded = carry
        ahead = load(step + 1)
        return add(step, sums, loaded), ahead

    carry = sums, load(0)
    if steps > 1:
        carry = jax.lax.fori_loop(0, steps - 1, turn, carry)
    return add(steps - 1, *carry)


def _bytes(words: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(words, dtype).astype(jnp.int32)


def assembly(code: str, *operands: Array) -> Array:
    """Return what PTX computes of each element, int32.  Only within a kernel."""
    full = jnp.broadcast_arrays(*operands)
    shape = jax.ShapeDtypeStruct(full[0].shape, jnp.int32)
    (result,) = plgpu.elementwise_inline_asm(
        code,
        args=full,
        constraints=",".join(["=r"] + ["r"] * len(full)),
        pack=1,
        result_shape_dtypes=[shape],
    )
    return result
