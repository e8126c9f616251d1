"""A mixture of experts in one launch, in PTX: IQ2_XXS, Q2_K and, shared, Q8_0.

`experts` by Triton waits for weights in registers, and looks codes up through the L1
cache.  Here the copy engine brings weights into shared memory, a task ahead, every lane
has a table of codes for itself, and programs wait for each other, not for a launch, and
have weights of down in place by then: none of that can be said to Triton.

On an H200 six experts of 2048 x 4096 and the shared one's down take one row 20.9 us and
two rows 34, where Triton's launches take 38 and 56 one after the other.  Half of it are
products by `dp4a`, if that takes four cycles a warp (benchmarks/NOTES.md).

No two of these launches may run side by side: each has all its programs wait for each
other, so that they have to have the multiprocessors for themselves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from ds4jax.pallas import iq2_xxs, ptx
from ds4jax.pallas.experts import Experts, packed
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, shapes
from ds4jax.pallas.matmul import is_q8_0
from ds4jax.pallas.moe_program import program
from ds4jax.pallas.moe_shape import HIDDEN, ORDER, THREADS, Shape
from ds4jax.pallas.ptx import LANES
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import QuantTensor

_ROUTED = "IQ2_XXS", "IQ2_XXS", "Q2_K"
"""Formats of gate, up and down."""

_GATED = "grid", "signs", "d"
"""Planes of gate and up."""


def programs(
    routed: Experts, shared_down: object, activation: object, each: int
) -> int:
    """Return how many programs `multiply` would have: one for each multiprocessor.

    0 if it is not for these experts, or not for the device that there is.
    """
    return ptx.programs() if serves(routed, shared_down, activation, each) else 0


def serves(routed: Experts, shared_down: object, activation: object, each: int) -> bool:
    """Say whether `multiply` is for these experts, on a GPU that has what it needs.

    Args:
      routed: stacks of experts.
      shared_down: down of the shared expert.
      activation: of both.
      each: experts of a row.
    """
    gate, up, down = packed(routed)
    if (gate.format, up.format, down.format) != _ROUTED or not is_q8_0(shared_down):
        return False
    if not isinstance(activation, Swiglu):
        return False
    (_, hidden, width), (_, out, _) = gate.shape, down.shape
    # A lane loads its groups of a row of gate at once, and they share a `d`.
    lane, rest = divmod(width // GROUP, LANES)
    if hidden != HIDDEN or rest or lane not in (2, 4) or out % GROUP:
        return False
    return _shape(1, 1, each, width, out, "float32", 0, 1).shared <= ptx.SHARED


def multiply(
    x: FixedPoint,
    hidden: FixedPoint,
    routed: Experts,
    shared_down: QuantTensor,
    expert_ids: Int[Array, "R U"],
    share: Float[Array, "R U"],
    activation: Swiglu,
    dtype: str,
    width: int,
    programs: int,
) -> tuple[Float[Array, "R Out"], Float[Array, "R Out"]]:
    """Return what the shared expert makes of rows, and what those that they chose do.

    Args:
      x: R rows of In, in the order of IQ2_XXS.
      hidden: R rows of what the shared expert's down is to be multiplied by.
      routed: stacks of experts.
      shared_down: [Out, F].
      expert_ids: of each row.
      share: of each of them.
      activation: of the routed experts.
      dtype: operand type.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.
      programs: that run side by side; the result is the same whatever their number.
    """
    rows, each = expert_ids.shape
    *_, down = packed(routed)
    _, out, _ = down.shape
    shape = _shape(
        width, rows, each, GROUP * x.scale.shape[1], out, dtype, activation.limit,
        programs,
    )  # fmt: skip
    result = jax.ShapeDtypeStruct((rows, out), jnp.float32)
    *_, own, found = ptx.launch(
        f"moe_{width}x{each}x{out}x{GROUP * shape.groups}",
        program(shape),
        operands(shape, x, hidden, routed, shared_down, expert_ids, share),
        (*shapes(rows * each, HIDDEN, dtype, ORDER), result, result),
        shape.shared,
        programs,
        THREADS // LANES,
    )
    return own, found


def _shape(width, rows, each, into, out, dtype, limit, programs) -> Shape:
    return Shape(width, rows - width, each, into // GROUP, out, dtype, limit, programs)


def operands(
    s: Shape,
    x: FixedPoint,
    hidden: FixedPoint,
    routed: Experts,
    shared_down: QuantTensor,
    expert_ids: Array,
    share: Array,
) -> list[Array]:
    """Return what a program reads, in its order."""
    gate, up, down = (w.planes for w in packed(routed))
    own = shared_down.planes
    return [
        expert_ids.reshape(-1), share.reshape(-1), x.words, x.scale,
        jnp.asarray(_table()), *(w[n] for w in (gate, up) for n in _GATED),
        *(down[n] for n in ("quants", "scales", "d", "dmin")),
        hidden.words, hidden.scale, own["quants"], own["d"],
        jnp.zeros(s.parts, jnp.uint32),
    ]  # fmt: skip


def _table() -> UInt32[np.ndarray, "320"]:
    """Return the codes of the grid's rows, then what they stand for, for each lane.

    Bits 0 and 1 of nibble i are the code of weight i.
    """
    codes = iq2_xxs.codes().astype(np.uint32) * iq2_xxs.SPREAD & 0x33333333
    return np.concatenate([codes, iq2_xxs.PICKED * LANES]).astype(np.uint32)
