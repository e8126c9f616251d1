"""Long passes over a cache, a block of queries at a time.

What queries make with all that they can see is larger than either, by the number of
heads; so only a block of them is looked at at once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ds4jax.model.cache import Rows, View
from ds4jax.pallas.passes import is_prefill

BLOCK = 256
"""Queries of a block."""


def has_blocks(rows: Rows) -> bool:
    """Say whether this is a pass over a cache of more queries than a block's."""
    return is_prefill() and rows.width > BLOCK


def in_blocks(function: Callable[..., Array], *rows: Array) -> Array:
    """Return `function(*rows)` of arrays [B, T, ...], computed by blocks of T.

    The last block is filled up with zeros, which must not raise anything.
    """
    batch, width = rows[0].shape[:2]
    blocks = -(-width // BLOCK)

    def split(array):
        fill = [(0, 0)] * array.ndim
        fill[1] = (0, blocks * BLOCK - width)
        array = jnp.pad(array, fill)
        return array.reshape(batch, blocks, BLOCK, *array.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(lambda block: function(*block), tuple(map(split, rows)))
    found = found.swapaxes(0, 1)
    return found.reshape(batch, blocks * BLOCK, *found.shape[3:])[:, :width]


def recent(
    view: View, positions: Int[Array, "B T"], window: int
) -> tuple[Float[Array, "B S K"], Bool[Array, "B T S"]]:
    """Return the rows that successive queries see, and which each of them sees.

    Args:
      view: of the pass.
      positions: of the queries, each one after the last.
      window: how many rows a query sees, itself included.
    """
    offset = jnp.arange(1 - window, positions.shape[1])
    wanted = positions[:, :1] + offset
    there = View(view.positions, view.positions, view.start, view.ring, view.appended)
    known = (there.take(wanted) == wanted) & (wanted >= 0)
    age = positions[..., None] - wanted[:, None]
    return view.take(wanted), known[:, None] & (age >= 0) & (age < window)
