"""Weights of a part of a layer, inputs for it, and what results are compared by."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np

from ds4jax import schema
from ds4jax.config import ModelConfig
from ds4jax.model.layers import scope

ATOL = 1e-5
"""Float32 against float64 over sums of at most 256 terms of size 1."""
ULPS = 3e-7
"""Relative: a few roundings of float32."""

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=ATOL)
same = np.testing.assert_array_equal


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@functools.cache
def layers(config: ModelConfig) -> dict[str, jax.Array]:
    weights = models.lively_weights(schema.trunk(config), config, seed=0)
    return {name: jnp.asarray(weight) for name, weight in weights.items()}


def part(config: ModelConfig, prefix: str) -> dict[str, Any]:
    """Return the weights of a layer or of something in it."""
    return scope(layers(config), prefix)


def plain(weights: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(weight, np.float64) for name, weight in weights.items()}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
