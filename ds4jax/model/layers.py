"""The small parts every block is made of: linear maps, norms and the clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ds4jax.pallas.fixed_point import FixedPoint
from ds4jax.pallas.matmul import normed_kernel, quant_matmuls
from ds4jax.pallas.passes import Weight, by_kernel
from ds4jax.quant import dequantize

Weights = Mapping[str, Weight]
"""Weights by the names of `schema.py`, or by what follows a prefix of them."""


def scope(weights: Weights, prefix: str) -> dict[str, Weight]:
    """Return the weights whose names start with `prefix`, by the rest of the name."""
    return {
        k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)
    }


class Linear(nnx.Module):
    """A linear map without bias, `y = W x`, `W [Out, In]`."""

    def __init__(self, weight: Weight, dtype: str = "float32"):
        self.weight = nnx.Param(weight)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*rows In"]) -> Float[Array, "*rows Out"]:
        """Return `W x` in float32, the operands rounded to `dtype`."""
        (y,) = project(x, self)
        return y


def project(
    x: Float[Array, "*rows In"], *maps: Linear, fixed: FixedPoint | None = None
) -> tuple[Float[Array, "*rows _"], ...]:
    """Return what each of some maps of one operand type gives for the same rows.

    Args:
      x: the rows.
      maps: the maps.
      fixed: as of `quant_matmuls`.
    """
    weights = [linear.weight.get_value() for linear in maps]
    return quant_matmuls(x, weights, maps[0].dtype, fixed)


def rms(x: Float[Array, "*rows N"], eps: float) -> Float[Array, "*rows N"]:
    """Return `x / sqrt(mean(x^2) + eps)` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMS norm with the weight as stored (no `+ 1`)."""

    def __init__(self, weight: Weight, eps: float):
        self.weight = nnx.Param(dequantize(weight))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows N"]) -> Float[Array, "*rows N"]:
        """Return `rms(x)` times the weight, in float32."""
        return rms(x, self.eps) * self.weight.get_value()


def project_normed(
    x: Float[Array, "*rows In"], norm: RMSNorm, linear: Linear
) -> Float[Array, "*rows Out"]:
    """Return `linear(norm(x))`, on a GPU with the norm in the launch that it needs."""
    weights = norm.weight.get_value(), linear.weight.get_value()
    kernel = normed_kernel((weights[0], norm.eps), weights[1], linear.dtype)
    return by_kernel(lambda x: linear(norm(x)), x, cuda=kernel)
