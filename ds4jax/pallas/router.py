"""A router's choice of experts for a few rows, on NVIDIA GPUs, in one launch.

XLA sorts all the experts for the best few, which takes four launches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas.passes import Weight


class Router(NamedTuple):
    """How rows choose experts.

    Attributes:
      weight: [E, D].
      bias: [E], which takes part in the choice only; None if a table makes it.
      used: experts a row.
      scale: of their shares.
      smallest: the least total that these are divided by.
    """

    weight: Weight
    bias: Float[Array, "E"] | None
    used: int
    scale: float
    smallest: float


def serves(experts: int) -> bool:
    """Say whether `choose` is for so many experts."""
    return experts & (experts - 1) == 0


def choose(
    logits: Float[Array, "T E"],
    bias: Float[Array, "E"],
    used: int,
    scale: float,
    smallest: float,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> tuple[Int[Array, "T U"], Float[Array, "T U"]]:
    """Return the experts of each row, best first, and their weights: `MoE.route`.

    Args:
      logits: of the router.
      bias: takes part in the choice only.
      used: U, experts a row.
      scale: of the weights.
      smallest: the least total that they are divided by.
      width: how many rows, the first ones, are not copies of the last of these.
      interpret: without a GPU.
    """
    shape = len(logits), used
    return pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, smallest=smallest, width=width or len(logits)
        ),
        grid=(len(logits),),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="route",
    )(logits, bias)


def _kernel(
    logits_ref,  # [T, E]
    bias_ref,  # [E]
    chosen_ref,  # [T, U]
    share_ref,  # [T, U]
    *, scale, smallest, width,
):  # fmt: skip
    row, used = pl.program_id(0), chosen_ref.shape[1]
    read = jnp.minimum(row, width - 1)

    def probability(logits):
        softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        return jnp.sqrt(softplus)

    left = probability(logits_ref[read, :]) + bias_ref[:]
    expert, slot = jnp.arange(len(left)), jnp.arange(pl.next_power_of_2(used))
    chosen = jnp.zeros(slot.shape, jnp.int32)
    for place in range(used):
        best = jnp.argmax(left)
        chosen = jnp.where(slot == place, best, chosen)
        left = jnp.where(expert == best, -jnp.inf, left)
    # Read once more, for a sum over all experts would be a round of waiting for each.
    is_used = slot < used
    picked = jnp.where(is_used, probability(logits_ref[read, chosen]), 0)
    share = picked / jnp.maximum(jnp.sum(picked), smallest) * scale
    plgpu.store(chosen_ref.at[row, slot], chosen, mask=is_used)
    plgpu.store(share_ref.at[row, slot], share, mask=is_used)
