"""One launch for the rows of several weights, which are never put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from jax.experimental import pallas as pl
from jaxtyping import Array, Int


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
