"""A mixture of experts in one launch, in PTX: IQ2_XXS and Q2_K, and Q8_0 of all rows.

`experts` by Triton waits for weights in registers, and looks codes up through the L1
cache.  Here the copy engine brings weights into shared memory, a task ahead, every lane
has a table of codes for itself, and programs wait for each other, not for a launch: the
shared expert's gate and up are multiplied while the router's logits go round, and
weights of down are in place when hidden values are.  None of that can be said to
Triton.

On an H200 the router, six experts of 2048 x 4096 and the shared one take one row 25.7
us, two rows 39.3.  In a pass it is 27, where it was 32 by launches for the router, the
choice, the shared expert's gate and up, and then all else in PTX.  Half of it are
products by `dp4a`, if that takes four cycles a warp (benchmarks/NOTES.md).

No two of these launches may run side by side: each has all its programs wait for each
other, so that they have to have the multiprocessors for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ds4jax.pallas import iq2_xxs, ptx
from ds4jax.pallas.experts import Experts, packed
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, Order, shapes
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
    router: Router, routed: Experts, shared: Experts, activation: object
) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for these experts, or not for the device that there is.
    """
    return ptx.programs() if serves(router, routed, shared, activation) else 0


def serves(
    router: Router, routed: Experts, shared: Experts, activation: object
) -> bool:
    """Say whether `multiply` is for these experts, on a GPU that has what it needs.

    Args:
      router: chooses experts.
      routed: stacks of experts.
      shared: the one of all rows.
      activation: of all of them.
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
    shape = _shape(1, 1, router, width, out, "float32", 0, experts)
    return shape.shared <= ptx.SHARED


def multiply(
    x: Float[Array, "R In"],
    fixed: Sequence[FixedPoint],
    ids: Int[Array, "R U"] | None,
    router: Router,
    routed: Experts,
    shared: Experts,
    activation: Swiglu,
    dtype: str,
    width: int,
    programs: int,
) -> tuple[Float[Array, "R Out"], Float[Array, "R Out"], Int[Array, "R U"]]:
    """Return what the shared expert makes of rows, those they chose, and which.

    Args:
      x: the rows.
      fixed: the same in fixed point, in the order of Q8_0 and in that of IQ2_XXS.
      ids: of the rows' experts, if that is known.
      router: chooses experts else.
      routed: stacks of experts.
      shared: the one of all rows.
      activation: of all of them.
      dtype: operand type.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    rows, into = x.shape
    *_, down = packed(routed)
    _, out, _ = down.shape
    shape = _shape(width, rows, router, into, out, dtype, activation.limit, programs)
    *_, chosen, own, found = ptx.launch(
        f"moe_{width}x{shape.each}x{out}x{into}",
        program(shape),
        operands(shape, x, fixed, ids, router, routed, shared),
        written(shape),
        shape.shared,
        programs,
        THREADS // LANES,
    )
    return own, found, chosen


def _shape(width, rows, router, into, out, dtype, limit, programs) -> Shape:
    routing = Routing(
        router.weight.shape[0], router.bias is None, router.scale, router.smallest
    )
    sizes = into // GROUP, out, dtype, limit, programs
    return Shape(width, rows - width, router.used, routing, *sizes)


def operands(
    s: Shape,
    x: Array,
    fixed: Sequence[FixedPoint],
    ids: Array | None,
    router: Router,
    routed: Experts,
    shared: Experts,
) -> list[Array]:
    """Return what a program reads, in its order."""
    gate, up, down = (w.planes for w in packed(routed))
    own, by_word = fixed
    chooses, known = router.weight, router.bias if ids is None else ids
    assert known is not None and not isinstance(chooses, QuantTensor)
    return [
        x, own.words, by_word.words, own.scale, jnp.asarray(chooses), known,
        jnp.asarray(_table()), *(w[n] for w in (gate, up) for n in _GATED),
        *(down[n] for n in ("quants", "scales", "d", "dmin")),
        *(w.planes[n] for w in packed(shared) for n in ("quants", "d")),
        jnp.zeros(s.counters, jnp.uint32),
    ]  # fmt: skip


def written(s: Shape) -> list[jax.ShapeDtypeStruct]:
    """Return what programs write, in their order."""
    rows, array = s.rows + s.copied_rows, jax.ShapeDtypeStruct
    result = array((rows, s.out), jnp.float32)
    return [
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
