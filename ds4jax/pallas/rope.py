"""The rotations of `model.rope`, inside a kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def spread(frequencies: np.ndarray, width: int) -> np.ndarray:
    """Return `[width / 2]` frequencies: a pair that is not rotated turns by nothing."""
    return np.pad(frequencies, (width // 2 - len(frequencies), 0))


def angles(
    turn: tuple[Any, Any],
    row: int | Int[Array, ""],
    channel: Int[Array, "N"],
    width: int,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Return by what channels of a row are multiplied, and the others of their pairs.

    Args:
      turn: references of `model.rope.turn`'s [T, R], for the last channels; those
        before do not turn.
      row: of T.
      channel: of the row's.
      width: how many channels the row has.
    """
    cos_ref, sin_ref = turn
    place = channel - (width - cos_ref.shape[1])
    at = row, jnp.maximum(place, 0)
    return jnp.where(place >= 0, cos_ref[at], 1), jnp.where(place >= 0, sin_ref[at], 0)


def rotate(
    x: Float[Array, "*rows N"], cos: Float[Array, "pairs"], sin: Float[Array, "pairs"]
) -> Float[Array, "*rows N"]:
    """Return `x` with each pair of neighbouring channels turned.

    Triton cannot take a tile apart, but sum over two channels of which one is masked.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    is_even = jnp.arange(2).reshape(*(1,) * x.ndim, 2) == 0
    even = jnp.sum(jnp.where(is_even, pairs, 0), -1)
    odd = jnp.sum(jnp.where(is_even, 0, pairs), -1)
    turned_even, turned_odd = even * cos - odd * sin, even * sin + odd * cos
    turned = jnp.where(is_even, turned_even[..., None], turned_odd[..., None])
    return turned.reshape(x.shape)
