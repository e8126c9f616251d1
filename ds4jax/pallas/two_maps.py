"""Two products with Q8_0 weights after each other in one launch, in PTX.

The second's weights are on their way while programs wait for what the first gives:
they fill shared memory, and a launch neither ends nor starts in between.  By Triton
(`q8_0`) the second of two launches has nothing on its way until the first has ended.
On an H200 4096 by groups to 8192 and these to 4096 take 19.8 us, two rows 21.3; by two
launches, one after the other, 25.4 and 28.5.

No two of these launches may run side by side: programs of one wait for each other, so
each has to have a multiprocessor at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ds4jax.pallas import ptx
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, Order, shapes
from ds4jax.pallas.q8_arithmetic import COLUMNS, MULTIPLIERS, WARPS
from ds4jax.pallas.two_maps_program import program
from ds4jax.pallas.two_maps_shape import Shape
from ds4jax.quant import QuantTensor

_ROWS = 8
"""For which there has to be room, though not for their activations."""


def programs(first: QuantTensor, second: QuantTensor, groups: int, dtype: str) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for these weights, or not for the device that there is.
    """
    count = ptx.programs()
    return count if count and serves(first, second, groups, dtype, count) else 0


def serves(
    first: QuantTensor, second: QuantTensor, groups: int, dtype: str, programs: int
) -> bool:
    """Say whether `multiply` is for these weights, on a GPU that has what it needs.

    Args:
      first, second, groups, dtype, programs: as of `multiply`.
    """
    if first.format != "Q8_0" or second.format != "Q8_0":
        return False
    shape = _shape(first, second, groups, dtype, programs, _ROWS, _ROWS)
    if second.shape[1] != shape.middle or shape.middle % (groups * GROUP):
        return False
    for weight in shape.maps:
        # A task is the same parts of rows for each of a program's warps.
        if weight.columns % COLUMNS or not weight.parts or MULTIPLIERS % weight.parts:
            return False
    return shape.out % shape.maps[1].lines == 0 and shape.slots >= 2


def multiply(
    x: FixedPoint,
    first: QuantTensor,
    second: QuantTensor,
    groups: int,
    dtype: str,
    width: int,
    programs: int,
) -> Float[Array, "R Out"]:
    """Return rows times the first weight, by groups, and then the second, float32.

    The result of the first is put into fixed point, as by `q8_0.matvec_fixed`.

    Args:
      x: R * groups rows of In, the groups of a row one after the other.
      first: [groups * Mid, In].
      second: [Out, groups * Mid].
      groups: how many.
      dtype: operand type.
      width: how many of the R rows to compute; the others' results are copies of the
        last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    shape = _shape(
        first, second, groups, dtype, programs, width, len(x.words) // groups
    )
    *_, out = ptx.launch(
        f"two_maps_{width}x{shape.middle}x{shape.out}",
        program(shape),
        operands(shape, x, first, second),
        written(shape),
        shape.shared,
        programs,
        WARPS,
    )
    return out


def operands(
    s: Shape, x: FixedPoint, first: QuantTensor, second: QuantTensor
) -> list[Array]:
    """Return what a program reads, in its order."""
    return [x.words, x.scale, *weights(s, first, second)]


def weights(s: Shape, first: QuantTensor, second: QuantTensor) -> list[Array]:
    """Return what comes after the activations: weights and counters."""
    planes = [w.planes[name] for w in (first, second) for name in ("quants", "d")]
    return [*planes, jnp.zeros(s.counters, jnp.uint32)]


def written(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write: the middle's words and scales, and the result."""
    words, scale, _ = shapes(shape.rows, shape.middle, shape.dtype, Order())
    out = jax.ShapeDtypeStruct((shape.written, shape.out), jnp.float32)
    return [words, scale, out]


def _shape(first, second, groups, dtype, programs, rows, written):
    (middle, columns), (out, _) = first.shape, second.shape
    return Shape(rows, written, groups, columns, middle, out, dtype, programs)
