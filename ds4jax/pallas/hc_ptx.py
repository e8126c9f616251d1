"""A hyper connection's reading of the streams at the beginning of a launch in PTX.

By launches of their own (`hyper_connection`) it takes 7.5 us before a block begins, in
which no weight of the block is on its way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ds4jax.pallas import hc_shape
from ds4jax.pallas.fixed_point import Order, shapes
from ds4jax.pallas.hc_shape import MAPS, SUMS, Shape
from ds4jax.pallas.hyper_connection import Reading


def serves(reading: Reading) -> bool:
    """Say whether a launch can begin with it.

    Where there is an update it follows a block's launches.  Else nothing would keep it
    from running beside others whose programs wait for each other: a head's pass of
    older rows depends on nothing that the pass of the newest does.
    """
    if reading.update is None or not 1 <= len(reading.update[0]) <= 2:
        return False
    rows, m, d = reading.streams.shape
    return hc_shape.serves(m, d, rows, reading.fn.dtype.name)


def shape(reading: Reading, width: int, programs: int) -> Shape:
    """Return what programs are made for, that compute `width` rows."""
    (rows, _, d), c, update = reading.streams.shape, reading.config, reading.update
    assert update and len(reading.fn) == MAPS
    return Shape(
        width, rows - width, d, len(update[0]), reading.fn.dtype.name, c.dtype,
        programs, c.sinkhorn_iters, c.hc_eps, c.rms_eps,
    )  # fmt: skip


def operands(reading: Reading) -> list[Array]:
    """Return what a program reads of it, in its order."""
    assert reading.update
    parts, *of_streams = reading.update
    weights = reading.fn, reading.base, reading.scale, reading.norm
    return [reading.streams, *parts, *of_streams, *weights]


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write of it, in their order."""
    rows, m = s.rows + s.copied_rows, hc_shape.STREAMS
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    words, scale, _ = shapes(s.rows, s.width, s.dtype, Order())
    return [
        array(rows, m, s.width), array(s.groups, s.rows, SUMS), array(rows, s.width),
        words, scale, array(rows, m), array(rows, m, m),
    ]  # fmt: skip
