"""The rotation of `model.rope`, inside a kernel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def spread(frequencies: np.ndarray, width: int) -> np.ndarray:
    """Return `[width / 2]` frequencies: a pair that is not rotated turns by nothing."""
    return np.pad(frequencies, (width // 2 - len(frequencies), 0))


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
