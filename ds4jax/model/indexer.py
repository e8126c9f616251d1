"""The Lightning indexer: which compressed rows a CSA query attends to.

Source: ARCHITECTURE §6; ties go to the lowest index, as in ds4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.cache import CompressorCache, Rows, blank_invisible
from ds4jax.model.compressor import Compressor, finished
from ds4jax.model.layers import Linear, Weights, scope
from ds4jax.model.query_blocks import has_blocks, in_blocks
from ds4jax.model.rope import frequencies, rotate
from ds4jax.model.rounding import round_index
from ds4jax.pallas import long_index
from ds4jax.pallas.matmul import einsum
from ds4jax.pallas.passes import of_prefill


class Indexer(nnx.Module):
    """Scores compressed windows by small keys of their own, and picks the best."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.query = Linear(weights["indexer.attn_q_b.weight"], config.dtype)
        self.head_weights = Linear(weights["indexer.proj.weight"], config.dtype)
        self.compressor = Compressor(
            config, CSA_RATIO, config.index_dim, scope(weights, "indexer_compressor_")
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        q_lora: Float[Array, "B T Q"],
        cache: CompressorCache | None,
        rows: Rows,
    ) -> tuple[Int[Array, "B T N"], Bool[Array, "B T N"], CompressorCache | None]:
        """Pick each query's compressed rows.

        Args:
          x: normed hidden rows.
          q_lora: normed q-LoRA rows, the same as attention's.
          cache: the indexer's compressor state, or None.
          rows: where `x` belongs.

        Returns:
          Indices of the `N = min(top-k, C)` best rows, best first; whether each of
          them exists yet; and the state after.
        """
        score, cache = self.scores(x, q_lora, cache, rows)
        most = min(self.config.index_topk, score.shape[-1])
        best, index = jax.lax.top_k(score, most)
        return index, best > -jnp.inf, cache

    def scores(
        self,
        x: Float[Array, "B T D"],
        q_lora: Float[Array, "B T Q"],
        cache: CompressorCache | None,
        rows: Rows,
    ) -> tuple[Float[Array, "B T C"], CompressorCache | None]:
        """Return the score of each compressed row, -inf where there is none yet."""
        c = self.config
        rounded = c.kv_rounding == "ds4"
        # ds4's CPU path keeps the rounded keys in F16.
        keep = lambda row: round_index(row).astype(jnp.float16).astype(jnp.float32)  # noqa: E731
        keys, cache = self.compressor(
            x, cache, rows, keep if rounded else lambda row: row
        )
        query = self.query(q_lora).reshape(*x.shape[:2], c.index_heads, c.index_dim)
        table = frequencies(c, compressed=True)
        query = rotate(query, rows.positions[..., None], table)
        if rounded:
            query = round_index(query)

        exists = finished(rows, CSA_RATIO, keys.shape[1])
        keys = blank_invisible(keys, exists)
        share = self.head_weights(x) * (c.index_dim * c.index_heads) ** -0.5

        def compare(query, share):
            match = einsum("btij,bcj->btic", query, keys, c.dtype)
            return jnp.sum(share[..., None] * jax.nn.relu(match), axis=2)

        def kernel(query, share):
            count = jnp.sum(exists[0], -1)
            return long_index.scores(query[0], keys[0], share[0], count)[None]

        if has_blocks(rows):
            served = len(query) == 1 and c.dtype == "bfloat16"
            served = served and long_index.serves(query[0], keys[0])
            by_blocks = functools.partial(in_blocks, compare)
            cuda = kernel if served else None
            score = of_prefill(by_blocks, query, share, cuda=cuda)
        else:
            score = compare(query, share)
        return jnp.where(exists, score, -jnp.inf), cache
