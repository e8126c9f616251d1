"""A mixture of experts by kernels, on NVIDIA GPUs, where `moe_ptx` does not serve."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int

from ds4jax.pallas import experts, q8_0
from ds4jax.pallas.experts import Experts, packed
from ds4jax.pallas.fixed_point import FixedPoint, fix, fix_gated
from ds4jax.pallas.matmul import is_q8_0
from ds4jax.quant import QuantTensor


def has_kernels(routed: Experts) -> bool:
    """Say whether `moe_by_kernel` is for these experts."""
    formats = [w.format if isinstance(w, QuantTensor) else "" for w in routed]
    return formats[0] == formats[1] and all(f in experts.FORMATS for f in formats)


def has_shared_kernel(shared: Experts) -> bool:
    """Say whether `shared_by_kernel` is for this expert."""
    return all(is_q8_0(w) for w in shared)


def moe_by_kernel(
    x: Float[Array, "1 N In"],
    expert_ids: Int[Array, "N U"],
    share: Float[Array, "N U"],
    routed: Experts,
    shared: Experts,
    instead: Callable[[Array], Array],
    activation: Callable[[Array, Array], Array],
    dtype: str,
    width: int,
    fixed: FixedPoint | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "1 N Out"], Float[Array, "1 N Out"]]:
    """Return what the shared expert and those that rows chose make of them, on a GPU.

    Args:
      x: rows.
      expert_ids: of each row.
      share: of each of them.
      routed: of which `has_kernels`.
      shared: the one of all rows.
      instead: what it makes of them, if it has no kernel.
      activation: elementwise.
      dtype: operand type.
      width: how many of the N rows, the first ones, are not copies.
      fixed: as of `shared_by_kernel`.
      interpret: without a GPU.
    """
    gate, up, down = packed(routed)
    order, of_hidden = (experts.FORMATS[w.format].order for w in (gate, down))
    rows = fix(x[0], dtype, order, interpret=interpret)
    hidden = experts.gated(
        rows, gate, up, expert_ids, activation, dtype, of_hidden, width,
        interpret=interpret,
    )  # fmt: skip
    out = experts.weighed(hidden, down, expert_ids, share, width, interpret=interpret)
    if has_shared_kernel(shared):
        own = shared_by_kernel(
            x, shared, activation, dtype, width, fixed, interpret=interpret
        )
    else:
        own = instead(x)
    return own, out[None]


def shared_by_kernel(
    x: Float[Array, "1 N In"],
    expert: Experts,
    activation: Callable[[Array, Array], Array],
    dtype: str,
    width: int,
    fixed: FixedPoint | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "1 N Out"]:
    """Return `down activation(gate x, up x)` of an expert which `has_shared_kernel`.

    Args:
      x: rows.
      expert: the shared one.
      activation: elementwise.
      dtype: operand type.
      width: how many of the N rows, the first ones, are not copies.
      fixed: `fix(x[0], dtype)`, if it is there already.
      interpret: without a GPU.
    """
    gate, up, down = packed(expert)
    rows = fix(x[0], dtype, interpret=interpret) if fixed is None else fixed
    by_gate, by_up = q8_0.matvecs(rows, [gate, up], width, interpret=interpret)
    hidden = fix_gated(by_gate, by_up, activation, dtype, interpret=interpret)
    out = q8_0.matvec(hidden, down, width=width, interpret=interpret)
    return out[None, :, 0]
