"""Attention and both maps of its output in one launch, in PTX.

By launches of their own (`attention`, `two_maps`) no weight is on its way before parts
of attention are put together.  Here programs attend to parts, tell each other what they
find, put it together and multiply it, and weights fill shared memory meanwhile.  On an
H200 a layer's takes one row 26.8 us in a pass, by launches 29.6 (dense) to 32.8 (CSA);
two rows 32.6 and 31 to 34.6.

Operands of attention's products are bfloat16.  No two of these launches may run side by
side: programs of one wait for each other, so each has to have a multiprocessor at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ds4jax.pallas import attend_shape, ptx, two_maps
from ds4jax.pallas.attention import Source, Turn
from ds4jax.pallas.fixed_point import Order, shapes
from ds4jax.pallas.q8_arithmetic import WARPS
from ds4jax.pallas.two_maps_program import program
from ds4jax.pallas.two_maps_shape import Shape
from ds4jax.quant import QuantTensor


class Maps(NamedTuple):
    """The output's maps.

    Attributes:
      first, second, groups, dtype: as of `two_maps.multiply`.
    """

    first: QuantTensor
    second: QuantTensor
    groups: int
    dtype: str


def programs(
    query: Float[Array, "T H K"], sources: Sequence[Source], turned: int, maps: Maps
) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for such operands, or not for the device that there is.

    Args:
      query, sources, maps: as of `multiply`.
      turned: channels of a head that are rotated.
    """
    count = ptx.programs()
    if not count or not two_maps.serves(*maps, count):
        return 0
    s = shape(query, sources, turned, 0.0, maps, len(query), count)
    assert s.attention
    return count if attend_shape.serves(s.attention) and s.slots >= 2 else 0


def multiply(
    query: Float[Array, "T H K"],
    sources: Sequence[Source],
    sinks: Float[Array, "H"],
    turn: Turn,
    eps: float,
    maps: Maps,
    width: int,
    programs: int,
) -> Float[Array, "T Out"]:
    """Return both maps of what `attention.attend` gives, float32.

    Args:
      query, sources, sinks, turn, eps: as of `attention.attend`.
      maps: the output's.
      width: how many of the T rows to compute; the others' results are copies of the
        last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    s = shape(query, sources, turn[0].shape[1], eps, maps, width, programs)
    *_, out = ptx.launch(
        f"attn_out_{width}x{s.middle}x{s.out}",
        program(s),
        operands(s, query, sources, sinks, turn, maps),
        written(s),
        s.shared,
        programs,
        WARPS,
    )
    return out


def shape(
    query: Float[Array, "T H K"],
    sources: Sequence[Source],
    turned: int,
    eps: float,
    maps: Maps,
    width: int,
    programs: int,
) -> Shape:
    """Return what programs are made for; the arguments are those of the others."""
    (rows, heads, k), groups = query.shape, maps.groups
    own = tuple(
        attend_shape.Source(len(held), visible.shape[1], index is not None)
        for held, visible, index in sources
    )
    attention = attend_shape.Shape(
        width, heads, k, turned, groups, own, eps, maps.dtype, programs
    )
    (middle, columns), (out, _) = maps.first.shape, maps.second.shape
    sizes = width, rows, groups, columns, middle, out
    return Shape(*sizes, maps.dtype, programs, attention)


def operands(
    s: Shape,
    query: Float[Array, "T H K"],
    sources: Sequence[Source],
    sinks: Float[Array, "H"],
    turn: Turn,
    maps: Maps,
) -> list[Array]:
    """Return what a program reads, in its order."""
    given = [query, *turn, sinks]
    for held, visible, index in sources:
        given += [held, visible.astype(jnp.int32)]
        given += [] if index is None else [index]
    return [*given, *two_maps.weights(s, maps.first, maps.second)]


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write: of attention, then as `two_maps` does."""
    a = s.attention
    assert a
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    of_heads = a.parts, a.rows, a.heads
    words, scale, _ = shapes(a.rows * a.groups, a.columns, a.dtype, Order())
    found = [array(*of_heads), array(*of_heads), array(*of_heads, a.width)]
    return [*found, words, scale, *two_maps.written(s)]
