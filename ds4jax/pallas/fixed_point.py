"""Activations as fixed-point numbers, so that integer units multiply them.

A GPU takes four products of bytes and their sum in one instruction (`dp4a`), which
leaves nothing to convert: the quants of every format are bytes as they are.  A row is
therefore cut into groups of 32, as Q8_0's are, each with a power of two for its scale
and two or three limbs, signed bytes.  Sums of a group are exact integers, so no order
of them can change a bit.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt32

GROUP = 32
"""Values that share a scale."""

LIMBS = {"float32": 3, "bfloat16": 2}
"""Limbs by the type operands are to have.

A value is off by at most 2^-(8 limbs - 2) of the power of two above its group's
largest: 2^-22, next to a float32's own 2^-24; and 2^-14 for one already rounded to
bfloat16, of which nothing is lost down to a 64th of the largest.
"""


@struct.dataclass
@no_type_check
class FixedPoint:
    """Rows of fixed-point numbers: `scale` times the limbs read as one number.

    Attributes:
      words: uint32 [R, limbs, G, 8]: 32 bytes of each group, the highest limb first.
      scale: float32 [R, G].
      sums: float32 [R, G, 2]: of the values themselves, in each half of a group.
    """

    words: UInt32[Array, "R limbs G 8"]
    scale: Float[Array, "R G"]
    sums: Float[Array, "R G 2"]


def fix(x: Float[Array, "R In"], dtype: str, *, interpret: bool = False) -> FixedPoint:
    """Return rows as fixed-point numbers, for products of operands of `dtype`.

    Args:
      x: the rows.
      dtype: one of LIMBS.
      interpret: without a GPU.
    """
    rows, limbs, groups = len(x), LIMBS[dtype], x.shape[1] // GROUP
    at_once = min(groups & -groups, 8)
    shapes = (rows, limbs, groups, 8), (rows, groups), (rows, groups, 2)
    types = jnp.uint32, jnp.float32, jnp.float32
    return FixedPoint(
        *pl.pallas_call(
            functools.partial(_kernel, dtype=dtype, limbs=limbs, at_once=at_once),
            grid=(rows, groups // at_once),
            out_shape=tuple(map(jax.ShapeDtypeStruct, shapes, types)),
            compiler_params=plgpu.CompilerParams(num_warps=1),
            interpret=interpret,
            name="fix",
        )(x.reshape(rows, groups, 2, 4, 4))
    )


def _kernel(
    x_ref,  # [R, G, 2, 4, 4]: halves of a group, their words, the bytes of a word
    words_ref,  # [R, limbs, G, 8]
    scale_ref,  # [R, G]
    sums_ref,  # [R, G, 2]
    *, dtype, limbs, at_once,
):  # fmt: skip
    row, own = pl.program_id(0), pl.ds(pl.program_id(1) * at_once, at_once)
    x = x_ref[row, own, :, :, :].astype(dtype).astype(jnp.float32)
    largest = jnp.max(jnp.max(jnp.max(jnp.abs(x), -1), -1), -1)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) & 0x7F800000
    # A group of zeros, or of numbers so small that their scale would not be normal.
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    power = jnp.maximum(power, 2.0**-100)
    unit = 2.0 ** (8 * limbs - 3)
    scaled = x / power[:, None, None, None] * unit
    # Rounded half up: the same everywhere.
    value = jnp.floor(scaled + 0.5).astype(jnp.int32)
    place = 8 * jax.lax.broadcasted_iota(jnp.int32, value.shape, 3)
    for limb in reversed(range(limbs)):
        low = ((value + 128) & 255) - 128
        value = (value - low) >> 8
        words = jnp.sum((low & 255) << place, -1).reshape(at_once, 8)
        words_ref[row, limb, own, :] = jax.lax.bitcast_convert_type(words, jnp.uint32)
    scale_ref[row, own] = power / unit
    sums_ref[row, own, :] = jnp.sum(jnp.sum(x, -1), -1)


def dot(
    w: UInt32[Array, "..."], limbs: list[UInt32[Array, "..."]], interpret: bool
) -> list[Int[Array, "..."]]:
    """Return the products of words of four signed bytes with those of each limb.

    Only within a kernel.  The first two limbs come back as one number, the third by
    itself: the three as one would not fit.

    Args:
      w: of the weights.
      limbs: of the activations, broadcast to the shape of `w`.
      interpret: whether the kernel is interpreted, which has no such instruction.
    """
    if interpret:
        parts = [_bytewise(w, limb) for limb in limbs]
        return [parts[0] * 256 + parts[1], *parts[2:]]
    first = _assembly(
        "{.reg .b32 t; dp4a.s32.s32 t, $1, $2, 0; shl.b32 t, t, 8;"
        " dp4a.s32.s32 $0, $1, $3, t;}",
        w, *limbs[:2],
    )  # fmt: skip
    return [first, *(_assembly("dp4a.s32.s32 $0, $1, $2, 0;", w, x) for x in limbs[2:])]


def add_dot(
    sums: list[Int[Array, "..."]],
    w: UInt32[Array, "..."],
    limbs: list[UInt32[Array, "..."]],
    interpret: bool,
) -> list[Int[Array, "..."]]:
    """Return `sums`, one for each limb, with the products of `dot` added."""
    if interpret:
        return [so_far + _bytewise(w, x) for so_far, x in zip(sums, limbs, strict=True)]
    code = "dp4a.s32.s32 $0, $1, $2, $3;"
    return [
        _assembly(code, w, x, so_far) for so_far, x in zip(sums, limbs, strict=True)
    ]


def total(parts: list[Int[Array, "..."]]) -> Float[Array, "..."]:
    """Return sums of what `dot` gives as float32, in units of the scale."""
    value = parts[0].astype(jnp.float32)
    for part in parts[1:]:
        value = value * 256 + part.astype(jnp.float32)
    return value


def _bytewise(w, x):
    signed = lambda words, i: (words << (24 - 8 * i)).astype(jnp.int32) >> 24  # noqa: E731
    first, *rest = (signed(w, i) * signed(x, i) for i in range(4))
    return sum(rest, first)


def _assembly(code: str, *operands: Array) -> Array:
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
