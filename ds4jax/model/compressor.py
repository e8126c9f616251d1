"""Compressors: one row for every `ratio` tokens, pooled by a per-channel softmax.

HCA pools disjoint windows; CSA (ratio 4) pools each window with the one before it,
through separate halves of the projections (ARCHITECTURE §5).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.cache import CompressorCache, Rows, extend, scatter
from ds4jax.model.layers import Linear, RMSNorm, Weights, project
from ds4jax.model.rope import frequencies, rotate
from ds4jax.quant import dequantize


class Compressor(nnx.Module):
    """Pools a layer's normed inputs into rows of `width` channels."""

    def __init__(self, config: ModelConfig, ratio: int, width: int, weights: Weights):
        self.kv = Linear(weights["kv.weight"], config.dtype)
        self.gate = Linear(weights["gate.weight"], config.dtype)
        self.ape = nnx.Param(weights["ape.weight"])
        self.norm = RMSNorm(weights["norm.weight"], config.rms_eps)
        self.config = config
        self.ratio = ratio
        self.width = width

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: CompressorCache | None,
        rows: Rows,
        round_row,
    ) -> tuple[Float[Array, "B C N"], CompressorCache | None]:
        """Take in a pass's rows and finish the windows that they complete.

        Args:
          x: normed hidden rows, the same as attention's.
          cache: the state before, or None for a sequence that starts here.
          rows: where `x` belongs.
          round_row: applied to each finished row before it is kept.

        Returns:
          All rows finished so far, at their index, and the state after.  Row w is
          live for a query at t if `w < (t + 1) // ratio`.
        """
        ape = dequantize(self.ape.get_value())[rows.positions % self.ratio]
        kv, gate = project(x, self.kv, self.gate)
        new = jnp.stack([kv, gate + ape], axis=2)
        view, inputs = extend(cache and cache.inputs, new, rows)

        # No pass of T rows completes more windows than this.
        windows = -(-rows.width // self.ratio)
        index = rows.start[:, None] // self.ratio + jnp.arange(windows)
        pooled = self._pool(view, index)
        table = frequencies(self.config, compressed=True)
        pooled = round_row(rotate(self.norm(pooled), index * self.ratio, table))

        store = cache.rows if cache else jnp.zeros((x.shape[0], windows, self.width))
        done = index < (rows.end // self.ratio)[:, None]
        store = scatter(store, jnp.where(done, index, -1), pooled)
        return store, None if inputs is None else CompressorCache(inputs, store)

    def _pool(self, view, index):
        """Return the pooled `[B, windows, N]` of each window in `index`."""
        batch, windows = index.shape
        overlap = self.ratio == CSA_RATIO
        offsets = jnp.arange(-self.ratio if overlap else 0, self.ratio)
        positions = index[..., None] * self.ratio + offsets
        taken = view.take(positions.reshape(batch, -1))
        taken = taken.reshape(batch, windows, len(offsets), *taken.shape[2:])
        if overlap:
            # The previous window speaks through the first half of the channels,
            # the current one through the second; before the first there is none.
            taken = jnp.concatenate(
                [
                    taken[:, :, : self.ratio, :, : self.width],
                    taken[:, :, self.ratio :, :, self.width :],
                ],
                axis=2,
            )
        exists = (positions >= 0)[..., None]
        value, gate = taken[..., 0, :], taken[..., 1, :]
        weight = jax.nn.softmax(jnp.where(exists, gate, -jnp.inf), axis=2)
        return jnp.sum(weight * jnp.where(exists, value, 0), axis=2)


def finished(rows: Rows, ratio: int, capacity: int) -> Bool[Array, "B T C"]:
    """Say which compressed rows each query sees: those complete at its position.

    A row whose window ends exactly at the query is among them.  A padding row sees what
    the last real row does: what it would complete itself is not there.
    """
    count = jnp.minimum(rows.positions + 1, rows.end[:, None]) // ratio
    return jnp.arange(capacity) < count[..., None]
