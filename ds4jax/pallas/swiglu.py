"""The activation of experts, as a value: kernels are traced once for each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Swiglu(NamedTuple):
    """SwiGLU of clamped operands.

    Attributes:
      limit: on both operands.
    """

    limit: float

    def __call__(
        self, gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]
    ) -> Float[Array, "*rows F"]:
        """Return `silu(min(gate, limit)) * clip(up, -limit, limit)`.

        The gate is clamped from above only, before the silu (ARCHITECTURE §7).
        """
        clipped = jnp.clip(up, -self.limit, self.limit)
        return jax.nn.silu(jnp.minimum(gate, self.limit)) * clipped
