"""A layer's second half in one launch, in PTX: streams, router and experts.

Of experts those in IQ2_XXS and Q2_K, and one in Q8_0 of all rows.

`experts` by Triton waits for weights in registers, and looks codes up through the L1
cache.  Here the copy engine brings weights into shared memory, a task ahead, every lane
has a table of codes for itself, and programs wait for each other, not for a launch: the
shared expert's gate and up are multiplied while the router's logits go round, and
weights of down are in place when hidden values are.  None of that can be said to
Triton.

On an H200 streams, router, six experts of 2048 x 4096 and the shared one take one row
29.4 us, two rows 42.5, four 72; with the routed experts' products by `dp4a`, not on
matrix units, 30.4, 45.5 and 76.

No two of these launches may run side by side: each has all its programs wait for each
other, so that they have to have the multiprocessors for themselves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ds4jax.pallas import hc_ptx, iq2_xxs, ptx
from ds4jax.pallas.experts import Experts, packed
from ds4jax.pallas.fixed_point import GROUP, Order, shapes
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.matmul import is_q8_0
from ds4jax.pallas.moe_program import program
from ds4jax.pallas.moe_shape import (
    HIDDEN,
    LOGITS,
    ORDER,
    THREADS,
    Routing,
    Shape,
)
from ds4jax.pallas.ptx import LANES
from ds4jax.pallas.router import Router
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import QuantTensor

_ROUTED = ["IQ2_XXS", "IQ2_XXS", "Q2_K"]
"""Formats of gate, up and down."""

_GATED = "grid", "signs", "d"
"""Planes of gate and up."""


def programs(
    reading: Reading,
    router: Router,
    routed: Experts,
    shared: Experts,
    activation: object,
) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for such operands, or not for the device that there is.
    """
    count = ptx.programs()
    served = count and serves(reading, router, routed, shared, activation, count)
    return count if served else 0


def serves(
    reading: Reading,
    router: Router,
    routed: Experts,
    shared: Experts,
    activation: object,
    programs: int,
) -> bool:
    """Say whether `multiply` is for such operands, on a GPU that has what it needs.

    Args:
      reading: of the streams.
      router: chooses experts.
      routed: stacks of experts.
      shared: the one of all rows.
      activation: of all of them.
      programs: that run side by side.
    """
    formats = [w.format if isinstance(w, QuantTensor) else "" for w in routed]
    if formats != _ROUTED or not all(is_q8_0(w) for w in shared):
        return False
    chooses = router.weight
    if isinstance(chooses, QuantTensor) or chooses.dtype != jnp.float16:
        return False
    if not isinstance(activation, Swiglu):
        return False
    gate, _, down = packed(routed)
    (experts, hidden, width), (_, out, _) = gate.shape, down.shape
    # A lane loads its groups of a row of gate at once, and they share a `d`.
    lane, rest = divmod(width // GROUP, LANES)
    if hidden != HIDDEN or rest or lane not in (2, 4) or out % GROUP:
        return False
    if packed(shared)[0].shape[0] != HIDDEN or experts % LOGITS:
        return False
    if not hc_ptx.serves(reading):
        return False
    rows = len(reading.streams)
    found = shape(rows, reading, router, out, 0.0, programs)
    return found.shared <= ptx.SHARED


def multiply(
    reading: Reading,
    ids: Int[Array, "R U"] | None,
    router: Router,
    routed: Experts,
    shared: Experts,
    activation: Swiglu,
    width: int,
    programs: int,
) -> tuple[
    Float[Array, "R Out"],
    Float[Array, "R Out"],
    Int[Array, "R U"],
    Float[Array, "R M D"],
    Float[Array, "R M"],
    Float[Array, "R M M"],
]:
    """Return what the shared expert makes of rows, those they chose, and which.

    After that come, as of `hyper_connection.read`, the streams, `post` and `mix`.

    Args:
      reading: of the streams, from which the rows follow.
      ids: of the rows' experts, if that is known.
      router: chooses experts else.
      routed: stacks of experts.
      shared: the one of all rows.
      activation: of all of them.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    *_, down = packed(routed)
    _, out, _ = down.shape
    s = shape(width, reading, router, out, activation.limit, programs)
    results = ptx.launch(
        f"moe_{width}x{s.each}x{out}x{s.hc.width}",
        program(s),
        operands(s, reading, ids, router, routed, shared),
        written(s),
        s.shared,
        programs,
        THREADS // LANES,
    )
    names = s.operands[-1 - len(results) : -1]
    found = dict(zip(names, results, strict=True))
    return (
        found["to_shexp"], found["to_routed"], found["ids"], found["streams"],
        found["post"], found["mix"],
    )  # fmt: skip


def shape(
    width: int,
    reading: Reading,
    router: Router,
    out: int,
    limit: float,
    programs: int,
) -> Shape:
    """Return what programs are made for; the arguments are those of `multiply`.

    Args:
      out: rows of a weight of down.
      limit: of the SwiGLU.
      width, reading, router, programs: as they are.
    """
    hc = hc_ptx.shape(reading, width, programs)
    routing = Routing(
        router.weight.shape[0], router.bias is None, router.scale, router.smallest
    )
    sizes = hc.groups, out, hc.dtype, limit, programs
    return Shape(width, hc.copied_rows, router.used, routing, *sizes, hc)


def operands(
    s: Shape,
    reading: Reading,
    ids: Array | None,
    router: Router,
    routed: Experts,
    shared: Experts,
) -> list[Array]:
    """Return what a program reads, in its order."""
    gate, up, down = (w.planes for w in packed(routed))
    chooses, known = router.weight, router.bias if ids is None else ids
    assert known is not None and not isinstance(chooses, QuantTensor)
    return [
        *hc_ptx.operands(reading), jnp.asarray(chooses), known, jnp.asarray(_table()),
        *(w[n] for w in (gate, up) for n in _GATED),
        *(down[n] for n in ("quants", "scales", "d", "dmin")),
        *(w.planes[n] for w in packed(shared) for n in ("quants", "d")),
        jnp.zeros(s.counters, jnp.uint32),
    ]  # fmt: skip


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write, in their order."""
    rows, array = s.rows + s.copied_rows, jax.ShapeDtypeStruct
    result = array((rows, s.out), jnp.float32)
    return [
        *hc_ptx.written(s.hc),
        array((s.rows, s.routing.experts), jnp.uint32),
        array((s.rows, s.routing.experts), jnp.float32),
        array((s.rows, HIDDEN), jnp.float32),
        *shapes(s.rows, HIDDEN, s.dtype, Order())[:2],
        *shapes(s.pairs, HIDDEN, s.dtype, ORDER),
        array((rows, s.each), jnp.int32),
        result,
        result,
    ]


def _table() -> UInt32[np.ndarray, "320"]:
    """Return the codes of the grid's rows, then what they stand for, for each lane.

    Bits 0 and 1 of nibble i are the code of weight i.
    """
    codes = iq2_xxs.codes().astype(np.uint32) * iq2_xxs.SPREAD & 0x33333333
    return np.concatenate([codes, iq2_xxs.PICKED * LANES]).astype(np.uint32)
