"""Attention's input in one launch, in PTX: streams, and all maps of what they give.

The maps are of Q8_0 and float16, of the input or of the queries' latent, which the
first one gives and which is normed.  By launches of their own (`hyper_connection`,
`q8_0`, `plain`, `fixed_point`) no weight is on its way until the one before has ended.
Here programs take everything in turn, and shared memory fills while they wait.

On an H200 the input of a dense layer takes one row 16.8 us, of a CSA layer 24.2 and of
an HCA layer 17.2; by launches, side by side where they can be, 23.6, 34 and 28.

No two of these launches may run side by side: programs of one wait for each other, so
each has to have a multiprocessor at once (`hc_ptx.serves`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ds4jax.pallas import hc_ptx, ptx
from ds4jax.pallas.attn_maps_program import program
from ds4jax.pallas.attn_maps_shape import Map, Shape
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.latent import WIDTH
from ds4jax.pallas.matmul import is_q8_0
from ds4jax.pallas.passes import Weight
from ds4jax.pallas.q8_arithmetic import COLUMNS, MULTIPLIERS, WARPS
from ds4jax.quant import QuantTensor


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


def programs(reading: Reading, maps: Maps) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for such operands, or not for the device that there is.
    """
    count = ptx.programs()
    return count if count and serves(reading, maps, count) else 0


def serves(reading: Reading, maps: Maps, programs: int) -> bool:
    """Say whether `multiply` is for such operands, on a GPU that has what it needs.

    Args:
      reading, maps, programs: as of `multiply`.
    """
    weights, latent = [*maps.first, *maps.second], maps.first[0]
    if not all(_is_served(w) for w in weights) or not is_q8_0(latent):
        return False
    if not hc_ptx.serves(reading):
        return False
    s = shape(len(reading.streams), reading, maps, programs)
    for m in s.maps:
        if not m.parts or m.row % COLUMNS or MULTIPLIERS % m.parts or m.rows % m.lines:
            return False
    return latent.shape[0] == WIDTH and s.slots >= 2


def _is_served(w: Weight) -> bool:
    return is_q8_0(w) or (not isinstance(w, QuantTensor) and w.dtype == jnp.float16)


def multiply(
    reading: Reading, maps: Maps, width: int, programs: int
) -> tuple[
    list[Float[Array, "R _"]],
    Float[Array, "R M D"],
    Float[Array, "R M"],
    Float[Array, "R M M"],
]:
    """Return the block's input times each weight, in the order of `Maps`, float32.

    After that come, as of `hyper_connection.read`, the streams, `post` and `mix`.

    Args:
      reading: of the streams, which gives the input.
      maps: the weights.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    s = shape(width, reading, maps, programs)
    results = ptx.launch(
        f"attn_maps_{width}x{'_'.join(str(m.rows) for m in s.maps)}",
        program(s),
        operands(s, reading, maps),
        written(s),
        s.shared,
        programs,
        WARPS,
    )
    names = s.operands[-1 - len(results) : -1]
    found = dict(zip(names, results, strict=True))
    products = [found[m.out] for m in s.maps]
    return products, found["streams"], found["post"], found["mix"]


def shape(width: int, reading: Reading, maps: Maps, programs: int) -> Shape:
    """Return what programs are made for; the arguments are those of `multiply`."""
    both = [(w, False) for w in maps.first] + [(w, True) for w in maps.second]
    found = tuple(
        Map(f"map{i}", is_q8_0(w), w.shape[0], w.shape[1], is_second)
        for i, (w, is_second) in enumerate(both)
    )
    return Shape(found, maps.norm[1], hc_ptx.shape(reading, width, programs))


def operands(s: Shape, reading: Reading, maps: Maps) -> list[Array]:
    """Return what a program reads, in its order."""
    planes: list[Array] = []
    for w in (*maps.first, *maps.second):
        if isinstance(w, QuantTensor):
            planes += [w.planes["quants"], w.planes["d"]]
        else:
            planes.append(jnp.asarray(w))
    counters = jnp.zeros(s.counters, jnp.uint32)
    return [*hc_ptx.operands(reading), maps.norm[0], *planes, counters]


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write, in their order."""
    rows = s.rows + s.hc.copied_rows
    products = [jax.ShapeDtypeStruct((rows, m.rows), jnp.float32) for m in s.maps]
    return [*hc_ptx.written(s.hc), *products]
