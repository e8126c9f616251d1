"""Compressors: one row for every `ratio` tokens, pooled by a per-channel softmax.

HCA pools disjoint windows; CSA (ratio 4) pools each window with the one before it,
through separate halves of the projections (ARCHITECTURE §5).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.cache import CompressorCache, Rows, extend, scatter
from ds4jax.model.layers import Linear, RMSNorm, Weights, project
from ds4jax.model.rope import frequencies, rotate
from ds4jax.pallas import compressor as pallas
from ds4jax.pallas.passes import by_kernel
from ds4jax.quant import QuantTensor, dequantize


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
        return self.take_in(*self.project(x), cache, rows, round_row)

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
        """Return the channels of rows and what they weigh, before positions count."""
        value, gate = project(x, self.kv, self.gate)
        return value, gate

    def take_in(
        self,
        value: Float[Array, "B T V"],
        gate: Float[Array, "B T V"],
        cache: CompressorCache | None,
        rows: Rows,
        round_row,
    ) -> tuple[Float[Array, "B C N"], CompressorCache | None]:
        """Do what a call does, with what `project` gives for the rows."""
        take_in = functools.partial(self._take_in, rows=rows, round_row=round_row)
        if cache is None:
            return take_in(value, gate, None)[1], None
        kernel = functools.partial(self._take_in_by_kernel, rows=rows)
        served = (
            len(value) == 1
            and self.config.kv_rounding == "none"
            and pallas.serves(value[0], cache.inputs[0], self.ratio, self.width)
        )
        cuda = kernel if served else None
        inputs, store = by_kernel(take_in, value, gate, cache, cuda=cuda)
        return store, CompressorCache(inputs, store)

    def _take_in(self, value, gate, cache, rows, round_row):
        """Return the ring and the finished rows after a pass, given its projections."""
        ape = dequantize(self.ape.get_value())[rows.positions % self.ratio]
        new = jnp.stack([value, gate + ape], axis=2)
        view, inputs = extend(cache and cache.inputs, new, rows)

        # No pass of T rows completes more windows than this.
        windows = -(-rows.width // self.ratio)
        index = rows.start[:, None] // self.ratio + jnp.arange(windows)
        pooled = self._pool(view, index)
        table = frequencies(self.config, compressed=True)
        pooled = round_row(rotate(self.norm(pooled), index * self.ratio, table))

        store = cache.rows if cache else jnp.zeros((len(new), windows, self.width))
        done = index < (rows.end // self.ratio)[:, None]
        return inputs, scatter(store, jnp.where(done, index, -1), pooled)

    def _take_in_by_kernel(self, _, value, gate, cache, rows):
        ape = self.ape.get_value()
        inputs, store = pallas.compress(
            value[0], gate[0], rows.start, rows.end, cache.inputs[0], cache.rows[0],
            dequantize(ape) if isinstance(ape, QuantTensor) else jnp.asarray(ape),
            self.norm.weight.get_value(), frequencies(self.config, compressed=True),
            self.config.rms_eps,
        )  # fmt: skip
        return inputs[None], store[None]

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
