"""All maps of attention's input in one launch, in PTX: the queries' are two.

The maps are of Q8_0 and float16, of the input or of the latent that the first one gives
and that is normed.  By launches of their own (`q8_0`, `plain`, `fixed_point`) nothing
of the second is on its way until the latent is in fixed point, and what else is read of
the input beside them is in the way of each.  Here programs take everything in turn.

No two of these launches may run side by side: programs of one wait for each other, so
each has to have a multiprocessor at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ds4jax.pallas import ptx
from ds4jax.pallas.attn_maps_program import program
from ds4jax.pallas.attn_maps_shape import PART, WARPS, Map, Shape
from ds4jax.pallas.fixed_point import FixedPoint
from ds4jax.pallas.latent import WIDTH
from ds4jax.pallas.matmul import is_q8_0
from ds4jax.pallas.passes import Weight
from ds4jax.pallas.q8_arithmetic import MULTIPLIERS
from ds4jax.quant import QuantTensor

_ROWS = 8
"""For which there has to be room."""


class Maps(NamedTuple):
    """Weights.

    Attributes:
      first: [Out, In], of the input; the first of them gives the queries' latent.
      norm: weight and epsilon of the latent's RMS norm.
      second: [Out, Q], of the normed latent.
    """

    first: Sequence[Weight]
    norm: tuple[Float[Array, "Q"], float]
    second: Sequence[Weight]


def programs(maps: Maps, dtype: str) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for these weights, or not for the device that there is.
    """
    count = ptx.programs()
    return count if count and serves(maps, dtype, count) else 0


def serves(maps: Maps, dtype: str, programs: int) -> bool:
    """Say whether `multiply` is for these weights, on a GPU that has what it needs.

    Args:
      maps, dtype, programs: as of `multiply`.
    """
    weights, latent = [*maps.first, *maps.second], maps.first[0]
    if not all(_is_served(w) for w in weights) or not is_q8_0(latent):
        return False
    shape = _shape(maps, dtype, programs, _ROWS, _ROWS)
    for m in shape.maps:
        if not m.parts or m.row % PART or MULTIPLIERS % m.parts or m.rows % m.lines:
            return False
    return latent.shape[0] == WIDTH and shape.slots >= 2


def _is_served(w: Weight) -> bool:
    return is_q8_0(w) or (not isinstance(w, QuantTensor) and w.dtype == jnp.float16)


def multiply(
    x: Float[Array, "R In"],
    fixed: FixedPoint,
    maps: Maps,
    dtype: str,
    width: int,
    programs: int,
) -> list[Float[Array, "R _"]]:
    """Return rows times each weight, in the order of `Maps`, float32.

    Args:
      x: the rows.
      fixed: the same in fixed point.
      maps: the weights.
      dtype: operand type.
      width: how many of the R rows to compute; the others' results are copies of the
        last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    shape = _shape(maps, dtype, programs, width, len(x))
    found = ptx.launch(
        f"attn_maps_{width}x{'_'.join(str(m.rows) for m in shape.maps)}",
        program(shape),
        operands(shape, x, fixed, maps),
        written(shape),
        shape.shared,
        programs,
        WARPS,
    )
    return list(found)


def operands(s: Shape, x: Array, fixed: FixedPoint, maps: Maps) -> list[Array]:
    """Return what a program reads, in its order."""
    planes: list[Array] = []
    for w in (*maps.first, *maps.second):
        if isinstance(w, QuantTensor):
            planes += [w.planes["quants"], w.planes["d"]]
        else:
            planes.append(jnp.asarray(w))
    counters = jnp.zeros(1, jnp.uint32)
    return [fixed.words, fixed.scale, x, maps.norm[0], *planes, counters]


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write, in their order."""
    return [jax.ShapeDtypeStruct((s.written, m.rows), jnp.float32) for m in s.maps]


def _shape(maps: Maps, dtype, programs, rows, written) -> Shape:
    both = [(w, False) for w in maps.first] + [(w, True) for w in maps.second]
    found = tuple(
        Map(f"map{i}", is_q8_0(w), w.shape[0], w.shape[1], is_second)
        for i, (w, is_second) in enumerate(both)
    )
    return Shape(rows, written, found, dtype, maps.norm[1], programs)
