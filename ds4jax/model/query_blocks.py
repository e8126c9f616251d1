"""Long passes over a cache, a block of queries at a time.

What queries make with all that they can see is larger than either, by the number of
heads; so only a block of them is looked at at once.
"""

from __future__ import annotations

import dataclasses
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


def sees(
    positions: Int[Array, "B T"], held: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
    """Say which rows each query sees: those of the window that ends at it.

    Args:
      positions: of the queries.
      held: of the rows, negative for none.
      window: how many rows a query sees, itself included.
    """
    age = positions[..., None] - held[:, None]
    return (held[:, None] >= 0) & (age >= 0) & (age < window)


def recent(
    view: View, positions: Int[Array, "B T"], window: int
) -> tuple[Float[Array, "B S K"], Int[Array, "B S"]]:
    """Return the rows that successive queries see between them, by position.

    Args:
      view: of the pass.
      positions: of the queries, each one after the last.
      window: as of `sees`.

    Returns:
      S = T + window - 1 rows, the last of them the last query's own; and their
      positions, -1 for none.
    """
    wanted = positions[:, :1] + jnp.arange(1 - window, positions.shape[1])
    held = dataclasses.replace(view, rows=view.positions).take(wanted)
    is_held = (held == wanted) & (wanted >= 0)
    rows = jnp.where(is_held[..., None], view.take(wanted), 0)
    return rows, jnp.where(is_held, wanted, -1)
