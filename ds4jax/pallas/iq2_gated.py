"""Gate and up of the experts that rows chose, in IQ2_XXS, in PTX.

`experts.gated` by Triton waits for weights in registers, and looks codes up through the
L1 cache.  Here the copy engine brings weights into shared memory, a task ahead, and
every lane has a table of codes for itself: neither can be said to Triton.

On an H200 gate and up of six experts of 2048 x 4096, SwiGLU and fixed point among it,
take 13.1 us and those of two rows 22.3, where Triton's route (`iq2_xxs`) takes 19.3 and
29.1; the weights alone arrive in 7.5 and 12.5.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from ds4jax.pallas import iq2_xxs, ptx
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, Order, shapes
from ds4jax.pallas.iq2_program import program
from ds4jax.pallas.iq2_shape import WARPS, Shape
from ds4jax.pallas.ptx import LANES
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import QuantTensor


def programs(gate: QuantTensor, activation: object) -> int:
    """Return how many programs `gated` would have: one for each multiprocessor.

    0 if it is not for these experts, or not for the device that there is.
    """
    return ptx.programs() if serves(gate, activation) else 0


def serves(gate: QuantTensor, activation: object) -> bool:
    """Say whether `gated` is for these experts, on a GPU that has what it needs."""
    if gate.format != "IQ2_XXS" or not isinstance(activation, Swiglu):
        return False
    _, out, width = gate.shape
    # A lane loads its groups of a row at once, and they share a `d`.
    lane, rest = divmod(width // GROUP, LANES)
    shape = Shape(1, 1, out, width // GROUP, 2, Order(), "bfloat16", 0, 1)
    return (
        not rest and lane in (2, 4) and out % GROUP == 0 and shape.shared <= ptx.SHARED
    )


def gated(
    x: FixedPoint,
    gate: QuantTensor,
    up: QuantTensor,
    expert_ids: Int[Array, "R U"],
    activation: Swiglu,
    dtype: str,
    order: Order,
    width: int,
    programs: int,
) -> FixedPoint:
    """Return what `experts.gated` does.

    Args:
      x, gate, up, expert_ids, activation, dtype, order: as there.
      width: for how many of the R rows to compute.
      programs: that run side by side; the result is the same whatever their number.
    """
    rows, each = expert_ids.shape
    shape = Shape(
        width * each, each, gate.shape[1], x.scale.shape[1], x.words.shape[1], order,
        dtype, activation.limit, programs,
    )  # fmt: skip
    found = ptx.launch(
        "iq2_xxs_gated",
        program(shape),
        [expert_ids.reshape(-1), *operands(x, gate, up)],
        shapes(rows * each, shape.out, dtype, order),
        shape.shared,
        programs,
        WARPS,
    )
    return FixedPoint(*found, order=order)


def operands(x: FixedPoint, gate: QuantTensor, up: QuantTensor) -> list[Array]:
    """Return what a program reads besides the experts' ids, in its order."""
    planes = [w.planes[name] for w in (gate, up) for name in ("grid", "signs", "d")]
    return [x.words, x.scale, jnp.asarray(_table()), *planes]


def _table() -> UInt32[np.ndarray, "320"]:
    """Return the codes of the grid's rows, then what they stand for, for each lane.

    Bits 0 and 1 of nibble i are the code of weight i.
    """
    codes = iq2_xxs.codes().astype(np.uint32) * iq2_xxs.SPREAD & 0x33333333
    return np.concatenate([codes, iq2_xxs.PICKED * LANES]).astype(np.uint32)
