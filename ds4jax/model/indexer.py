"""The Lightning indexer: which compressed rows a CSA query attends to.

Source: ARCHITECTURE §6; ties go to the lowest index, as in ds4.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.cache import CompressorCache, Rows, blank_invisible
from ds4jax.model.compressor import Compressor, finished
from ds4jax.model.layers import Linear, Weights, scope
from ds4jax.model.query_blocks import has_blocks, in_blocks
from ds4jax.model.rope import frequencies, rotate, turn
from ds4jax.model.rounding import round_index
from ds4jax.pallas import indexer as pallas
from ds4jax.pallas import long_index
from ds4jax.pallas.matmul import einsum
from ds4jax.pallas.passes import by_kernel, of_prefill
from ds4jax.pallas.rope import spread


class Projected(NamedTuple):
    """What the indexer's maps make of rows.

    Attributes:
      value, gate: of its compressor.
      share: the heads' weights.
      query: all heads' queries, not rotated yet.
    """

    value: Float[Array, "B T V"]
    gate: Float[Array, "B T V"]
    share: Float[Array, "B T I"]
    query: Float[Array, "B T _"]


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
          Indices of the `N = min(top-k, C)` best rows, best first (on a GPU by index in
          a long pass, and where no more than N exist); whether each exists yet; and the
          state after.
        """
        return self.pick(self.project(x, q_lora), cache, rows)

    def project(
        self, x: Float[Array, "B T D"], q_lora: Float[Array, "B T Q"]
    ) -> Projected:
        """Return what the indexer's maps make of rows."""
        value, gate = self.compressor.project(x)
        return Projected(value, gate, self.head_weights(x), self.query(q_lora))

    def pick(
        self, projected: Projected, cache: CompressorCache | None, rows: Rows
    ) -> tuple[Int[Array, "B T N"], Bool[Array, "B T N"], CompressorCache | None]:
        """Do what a call does, with what `project` gives for the rows."""
        query, share, keys, cache = self._operands(projected, cache, rows)
        most = min(self.config.index_topk, keys.shape[1])

        def pick(query, share, keys):
            index = self._best(self._score(query, share, keys, rows), most)
            return index, index >= 0

        def kernel(width, query, share, keys):
            c = self.config
            every = spread(frequencies(c, compressed=True), c.index_dim)
            turned = turn(rows.positions[0], every)
            index = pallas.best(
                query[0], share[0], keys[0], rows.start, rows.end, turned,
                CSA_RATIO, most, c.dtype, width,
            )  # fmt: skip
            return index[None], finished(rows, CSA_RATIO, most)

        served = (
            len(query) == 1
            and self.config.kv_rounding == "none"
            and pallas.serves(query[0])
        )
        cuda = kernel if served else None
        return *by_kernel(pick, query, share, keys, cuda=cuda), cache

    def _best(self, score, most):
        """Return the indices of the best scores, -1 where there are fewer."""

        def by_sorting(score):
            score, index = jax.lax.top_k(score, most)
            return jnp.where(score > -jnp.inf, index, -1)

        def kernel(score):
            return long_index.choose(score[0], most)[None]

        served = len(score) == 1 and long_index.serves_choice(score[0])
        return of_prefill(by_sorting, score, cuda=kernel if served else None)

    def scores(
        self,
        x: Float[Array, "B T D"],
        q_lora: Float[Array, "B T Q"],
        cache: CompressorCache | None,
        rows: Rows,
    ) -> tuple[Float[Array, "B T C"], CompressorCache | None]:
        """Return the score of each compressed row, -inf where there is none yet."""
        projected = self.project(x, q_lora)
        query, share, keys, cache = self._operands(projected, cache, rows)
        return self._score(query, share, keys, rows), cache

    def _operands(self, projected, cache, rows):
        """Return unrotated queries, the heads' weights, keys and the state after."""
        c = self.config
        # ds4's CPU path keeps the rounded keys in F16.
        keep = lambda row: round_index(row).astype(jnp.float16).astype(jnp.float32)  # noqa: E731
        value, gate, share, query = projected
        keys, cache = self.compressor.take_in(
            value, gate, cache, rows,
            keep if c.kv_rounding == "ds4" else lambda row: row,
        )  # fmt: skip
        query = query.reshape(*query.shape[:2], c.index_heads, c.index_dim)
        return query, share, keys, cache

    def _score(self, query, share, keys, rows):
        c = self.config
        table = frequencies(c, compressed=True)
        query = rotate(query, rows.positions[..., None], table)
        if c.kv_rounding == "ds4":
            query = round_index(query)

        exists = finished(rows, CSA_RATIO, keys.shape[1])
        keys = blank_invisible(keys, exists)
        share = share * (c.index_dim * c.index_heads) ** -0.5

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
        return jnp.where(exists, score, -jnp.inf)
