"""Rotary embedding: the last R channels, in interleaved pairs, YaRN if compressed.

Neither table has a magnitude factor: ds4 and the reference config both cancel YaRN's
(ARCHITECTURE §3).  Angles are float32 `position * frequency`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig


def frequencies(config: ModelConfig, compressed: bool) -> np.ndarray:
    """Return the `[R / 2]` float32 angular frequencies of a layer's table.

    Args:
      config: gives the bases, R and YaRN.
      compressed: the table of CSA and HCA layers (base `compress_rope_theta`, YaRN)
        rather than that of dense layers and the MTP block.
    """
    c = config
    pair = np.arange(c.rope_dim // 2, dtype=np.float64)
    if not compressed:
        return (c.rope_theta ** (-2 * pair / c.rope_dim)).astype(np.float32)
    base = c.compress_rope_theta
    plain = base ** (-2 * pair / c.rope_dim)

    def correction(rotations: float) -> float:
        turns = c.yarn_original_context / (2 * math.pi * rotations)
        return c.rope_dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(correction(c.yarn_beta_fast)), 0)
    high = min(math.ceil(correction(c.yarn_beta_slow)), c.rope_dim - 1)
    # An empty ramp is a step: transformers widens it by the same 0.001.
    ramp = np.clip((pair - low) / max(high - low, 0.001), 0, 1)
    return (plain * (1 - ramp) + plain / c.yarn_factor * ramp).astype(np.float32)


def rotate(
    x: Float[Array, "*rows N"],
    positions: Int[Array, "*#rows"],
    frequencies: np.ndarray,
    inverse: bool = False,
) -> Float[Array, "*rows N"]:
    """Rotate the last `2 * len(frequencies)` channels of `x` by its position.

    `positions` must broadcast against the leading axes of `x`.  `inverse` negates
    the sine, which undoes the rotation at the same position.
    """
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if inverse:
        sin = -sin
    rope_dim = 2 * len(frequencies)
    kept, turned = x[..., :-rope_dim], x[..., -rope_dim:]
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([kept, turned.reshape(*x.shape[:-1], rope_dim)], axis=-1)


def turn(
    positions: Int[Array, "*rows"], frequencies: np.ndarray
) -> tuple[Float[Array, "*rows R"], Float[Array, "*rows R"]]:
    """Return what the kernels rotate by, a cosine and a sine for each channel.

    `rotate` makes of a channel that times the cosine plus the other channel of its pair
    times the sine; minus that, to rotate back.
    """
    angle = positions[..., None].astype(jnp.float32) * frequencies
    sin = jnp.sin(angle)
    signed = jnp.stack([-sin, sin], axis=-1)
    return jnp.repeat(jnp.cos(angle), 2, axis=-1), signed.reshape(*angle.shape[:-1], -1)
