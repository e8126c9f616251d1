"""What kernels share: sizes of tiles, weights in one launch, reads and writes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


def divisor(n: int, most: int) -> int:
    """Return the greatest power of two that divides `n`, or `most`, itself one."""
    return min(n & -n, most)


def for_own_weight(
    blocks: Sequence[int], body: Callable[[int, Int[Array, ""]], None]
) -> None:
    """Call `body` for the weight that this program belongs to; only within a kernel.

    Args:
      blocks: how many programs each weight has, in the order of their ids.
      body: of a weight's place in `blocks` and the program's number within it.
    """
    first = 0
    for weight, count in enumerate(blocks):
        block = pl.program_id(0) - first
        own = functools.partial(body, weight, block)
        if len(blocks) == 1:
            own()
        else:
            pl.when((block >= 0) & (block < count))(own)
        first += count


def read_once(ref: Any, index: tuple[Any, ...], interpret: bool) -> Array:
    """Return `ref[index]`, and let caches keep what is read again instead."""
    if interpret:
        return ref[index]
    return plgpu.load(ref.at[index], eviction_policy="evict_first")


def write_rows(
    out_ref: Any, columns: Any, results: Sequence[Float[Array, "N"]]
) -> None:
    """Write results to the first rows and copies of the last of them to the others.

    Args:
      out_ref: [R, Out].
      columns: N of Out.
      results: of a row each.
    """
    shape = out_ref.shape[0], *results[0].shape
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    # One store: an address for each row took as long as the sums.
    value = jnp.broadcast_to(results[0][None], shape)
    for first, result in enumerate(results[1:], 1):
        value = jnp.where(row >= first, result[None], value)
    out_ref[:, columns] = value
