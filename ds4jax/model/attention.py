"""Attention over raw window rows and compressed rows, in one softmax with sinks.

One shared head of width K serves as key and value of every query head.  Dense layers
see a sliding window; CSA adds the indexer's choice of compressed rows, HCA all of
them (ARCHITECTURE §4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.cache import (
    LayerCache,
    Rows,
    blank_invisible,
    extend,
    extend_tags,
)
from ds4jax.model.compressor import Compressor, finished
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import Linear, RMSNorm, Weights, rms, scope
from ds4jax.model.query_blocks import has_blocks, in_blocks, recent, sees
from ds4jax.model.rope import frequencies, rotate
from ds4jax.model.rounding import round_kv
from ds4jax.pallas import attention as pallas
from ds4jax.pallas import long_attention
from ds4jax.pallas.matmul import einsum, grouped_matmul
from ds4jax.pallas.passes import by_rows, of_prefill
from ds4jax.quant import dequantize


def attend(
    query: Float[Array, "B T H K"],
    sources: list[tuple[Float[Array, "..."], Bool[Array, "B T _"]]],
    sinks: Float[Array, "H"],
    dtype: str,
) -> Float[Array, "B T H K"]:
    """Return one softmax-weighted sum over every visible row of every source.

    Args:
      query: rotated queries.
      sources: pairs (rows, visible): rows are [B, S, K], shared by the queries, or
        [B, T, S, K]; they are key and value at once.
      sinks: a learned logit per head that takes probability and gives no value.
      dtype: operand type of the two products.
    """
    gathered = [rows for rows, _ in sources if rows.ndim == 4]
    masks = [visible for _, visible in sources]

    def with_rows(query, *parts):
        own, seen = iter(parts[len(masks) :]), parts[: len(masks)]
        each = [rows if rows.ndim == 3 else next(own) for rows, _ in sources]
        return query, list(zip(each, seen, strict=True))

    def together(*parts):
        return _attend(*with_rows(*parts), sinks, dtype)

    def kernel(width, *parts):
        query, sources = jax.tree.map(lambda a: a[0], with_rows(*parts))
        return pallas.attend(query, sources, sinks, dtype, width)[None]

    first = jax.tree.map(lambda a: a[0], (query, sources))
    served = len(query) == 1 and pallas.serves(*first)
    return by_rows(together, query, *masks, *gathered, cuda=kernel if served else None)


def _attend(query, sources, sinks, dtype):
    """Attend with the rows given, all at once."""
    own = ["bsk" if rows.ndim == 3 else "btsk" for rows, _ in sources]
    logits = [
        jnp.where(
            visible[:, :, None],
            einsum(f"bthk,{axes}->bths", query, rows, dtype) * query.shape[-1] ** -0.5,
            -jnp.inf,
        )
        for axes, (rows, visible) in zip(own, sources, strict=True)
    ]
    peak = sinks
    for part in logits:
        peak = jnp.maximum(peak, jnp.max(part, axis=-1))
    peak = jax.lax.stop_gradient(peak)
    total, summed = jnp.exp(sinks - peak), 0.0
    for axes, part, (rows, _) in zip(own, logits, sources, strict=True):
        weight = jnp.exp(part - peak[..., None])
        total = total + jnp.sum(weight, axis=-1)
        summed = summed + einsum(f"bths,{axes}->bthk", weight, rows, dtype)
    return summed / total[..., None]


class Attention(nnx.Module):
    """The attention of one layer, whichever of the three kinds its ratio makes it."""

    def __init__(self, config: ModelConfig, ratio: int, weights: Weights):
        linear = lambda name: Linear(weights[name], config.dtype)  # noqa: E731
        self.q_a = linear("attn_q_a.weight")
        self.q_norm = RMSNorm(weights["attn_q_a_norm.weight"], config.rms_eps)
        self.q_b = linear("attn_q_b.weight")
        self.kv = linear("attn_kv.weight")
        self.kv_norm = RMSNorm(weights["attn_kv_a_norm.weight"], config.rms_eps)
        self.sinks = nnx.Param(dequantize(weights["attn_sinks.weight"]))
        self.output_a = nnx.Param(weights["attn_output_a.weight"])
        self.output_b = linear("attn_output_b.weight")
        if ratio:
            self.compressor = Compressor(
                config, ratio, config.head_dim, scope(weights, "attn_compressor_")
            )
        if ratio == CSA_RATIO:
            self.indexer = Indexer(config, weights)
        self.config = config
        self.ratio = ratio

    def __call__(
        self, x: Float[Array, "B T D"], cache: LayerCache | None, rows: Rows
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Int[Array, "B T N"] | None]:
        """Attend.

        Args:
          x: normed hidden rows.
          cache: the layer's state, or None for a sequence that starts here.
          rows: where `x` belongs.

        Returns:
          The output, the state after, and the indexer's choice (CSA; -1 where fewer
          rows exist than it may pick), else None.
        """
        c = self.config
        table = frequencies(c, compressed=bool(self.ratio))
        keep = lambda row: row  # noqa: E731
        if c.kv_rounding == "ds4":
            keep = lambda row: round_kv(row, c.rope_dim)  # noqa: E731

        q_lora = self.q_norm(self.q_a(x))
        query = self.q_b(q_lora).reshape(*x.shape[:2], c.heads, c.head_dim)
        query = rotate(rms(query, c.rms_eps), rows.positions[..., None], table)

        row = keep(rotate(self.kv_norm(self.kv(x)), rows.positions, table))
        view, raw = extend(cache and cache.raw, row, rows)
        view, tags = extend_tags(cache and cache.tags, view, rows)
        visible = sees(rows.positions, view.positions, c.window)
        sources = [(blank_invisible(view.rows, visible), visible)]

        compressor, indexer, chosen = None, None, None
        if self.ratio:
            compressed, compressor = self.compressor(
                x, cache and cache.compressor, rows, keep
            )
            visible = finished(rows, self.ratio, compressed.shape[1])
            compressed = blank_invisible(compressed, visible)
            if self.ratio == CSA_RATIO:
                index, picked, indexer = self.indexer(
                    x, q_lora, cache and cache.indexer, rows
                )
                chosen = jnp.where(picked, index, -1)
                compressed, visible = self._choose(compressed, index, picked, rows)
            sources.append((compressed, visible))

        if has_blocks(rows):
            heads = self._attend_long(query, view, sources[1:], chosen, rows)
        else:
            heads = attend(query, sources, self.sinks.get_value(), c.dtype)
        heads = rotate(heads, rows.positions[..., None], table, inverse=True)
        grouped = heads.reshape(*x.shape[:2], c.o_groups, -1)
        low = grouped_matmul(grouped, self.output_a.get_value(), c.dtype)
        output = self.output_b(low.reshape(*x.shape[:2], -1))
        state = None if raw is None else LayerCache(raw, compressor, indexer, tags)
        return output, state, chosen

    def _attend_long(self, query, view, compressed, chosen, rows):
        """Attend with the window of each query or block, not with all of the pass."""
        c, sinks = self.config, self.sinks.get_value()

        def attend_block(query, positions, *visible):
            raw, held = recent(view, positions, c.window)
            others = [(r, v) for (r, _), v in zip(compressed, visible, strict=True)]
            sources = [(raw, sees(positions, held, c.window)), *others]
            return attend(query, sources, sinks, c.dtype)

        def by_blocks(query):
            masks = (visible for _, visible in compressed)
            return in_blocks(attend_block, query, rows.positions, *masks)

        def kernel(query):
            raw, held = recent(view, rows.positions, c.window)
            source = raw[0], held[0] >= 0
            for those, visible in compressed:
                every = jnp.where(visible, jnp.arange(visible.shape[-1]), -1)
                source += those[0], (every if chosen is None else chosen)[0]
            return long_attention.attend(query[0], *source, sinks=sinks)[None]

        served = len(query) == 1 and c.dtype == "bfloat16"
        served = served and long_attention.serves(query[0], c.window)
        return of_prefill(by_blocks, query, cuda=kernel if served else None)

    def _choose(self, compressed, index, picked, rows):
        """Narrow the compressed rows to the indexer's choice.

        A decode pass gathers them, so its cost does not grow with the context; a
        longer pass masks the others, which costs less than a gather per query.
        """
        if rows.is_decode:
            batch = jnp.arange(compressed.shape[0])[:, None, None]
            return compressed[batch, index], picked
        capacity = compressed.shape[1]
        batch = jnp.arange(compressed.shape[0])[:, None, None]
        row = jnp.arange(rows.width)[:, None]
        mask = jnp.zeros((*index.shape[:2], capacity), bool)
        return compressed, mask.at[batch, row, jnp.where(picked, index, capacity)].set(
            True, mode="drop"
        )
