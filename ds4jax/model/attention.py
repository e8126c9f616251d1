"""Attention over raw window rows and compressed rows, in one softmax with sinks.

One shared head of width K serves as key and value of every query head.  Dense layers
see a sliding window; CSA adds the indexer's choice of compressed rows, HCA all of
them (ARCHITECTURE §4).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.model.attention_input import InputMaps, Projected, project_input
from ds4jax.model.cache import (
    LayerCache,
    Rows,
    View,
    blank_invisible,
    extend,
    extend_tags,
    look_at,
    overwrite,
)
from ds4jax.model.compressor import Compressor, finished
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import (
    Linear,
    RMSNorm,
    Weights,
    rms,
    scope,
)
from ds4jax.model.query_blocks import has_blocks, in_blocks, recent, sees
from ds4jax.model.rope import frequencies, rotate, turn
from ds4jax.model.rounding import round_kv
from ds4jax.pallas import attention as pallas
from ds4jax.pallas import attn_out, kept_row, long_attention
from ds4jax.pallas.matmul import einsum, grouped_matmul, is_q8_0, two_maps_kernel
from ds4jax.pallas.passes import by_kernel, by_rows, of_prefill
from ds4jax.quant import dequantize


class Source(NamedTuple):
    """Rows to attend to, key and value at once.

    Attributes:
      rows: [B, C, K], shared by the queries.
      visible: [B, T, S], which of its S rows a query sees; others may hold anything.
      index: [B, T, S], which of the C they are; all, in their order, if not given.
    """

    rows: Float[Array, "B C K"]
    visible: Bool[Array, "B T S"]
    index: Int[Array, "B T S"] | None = None

    def seen(self) -> tuple[Float[Array, "..."], Bool[Array, "B T S"]]:
        """Return rows [B, S, K] or [B, T, S, K], of numbers only, and `visible`."""
        if self.index is None:
            return blank_invisible(self.rows, self.visible), self.visible
        batch = jnp.arange(len(self.rows))[:, None, None]
        rows = jnp.where(self.visible[..., None], self.rows[batch, self.index], 0)
        return rows, self.visible


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

    def together(query, *parts):
        own, seen = iter(parts[len(masks) :]), parts[: len(masks)]
        each = [rows if rows.ndim == 3 else next(own) for rows, _ in sources]
        return _attend(query, list(zip(each, seen, strict=True)), sinks, dtype)

    return by_rows(together, query, *masks, *gathered)


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
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        rows: Rows,
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
        return self.attend(project_input(self.input_maps, x), cache, rows)

    @property
    def input_maps(self) -> InputMaps:
        """The maps of the layer's input."""
        own = self.q_a, self.q_norm, self.q_b, self.kv
        compressor = self.compressor if self.ratio else None
        indexer = self.indexer if self.ratio == CSA_RATIO else None
        return InputMaps(*own, compressor, indexer)

    def attend(
        self, projected: Projected, cache: LayerCache | None, rows: Rows
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Int[Array, "B T N"] | None]:
        """Do what a call does, with what `project_input` gives for the rows."""
        c = self.config
        row, query, pooled, indexed = projected
        query = query.reshape(*row.shape[:2], c.heads, c.head_dim)
        view, raw = self.append(row, cache, rows)
        view, tags = extend_tags(cache and cache.tags, view, rows)
        visible = sees(rows.positions, view.positions, c.window)
        sources = [Source(view.rows, visible)]

        compressor, indexer, chosen = None, None, None
        if pooled:
            value, gate = pooled
            compressed, compressor = self.compressor.take_in(
                value, gate, cache and cache.compressor, rows, self._keep
            )
            if indexed:
                index, picked, indexer = self.indexer.pick(
                    indexed, cache and cache.indexer, rows
                )
                chosen = jnp.where(picked, index, -1)
                sources.append(_choose(compressed, index, picked, rows))
            else:
                visible = finished(rows, self.ratio, compressed.shape[1])
                sources.append(Source(compressed, visible))

        if has_blocks(rows):
            heads = self._attend_long(query, view, sources[1:], chosen, rows)
            output = self._project(heads)
        else:
            output = self._attend(query, sources, rows.positions)
        state = None if raw is None else LayerCache(raw, compressor, indexer, tags)
        return output, state, chosen

    def append(
        self, row: Float[Array, "B T K"], cache: LayerCache | None, rows: Rows
    ) -> tuple[View, Float[Array, "B P K"] | None]:
        """Return what queries of a pass look at, and the ring after its rows.

        Args:
          row: the rows to keep, neither normed nor rotated yet.
          cache: the layer's state, or None for a sequence that keeps nothing.
          rows: where they belong.
        """

        def finish(row):
            return self._keep(rotate(self.kv_norm(row), rows.positions, self.table))

        if cache is None or not rows.is_decode:
            return extend(cache and cache.raw, finish(row), rows)

        def kernel(_, row, ring):
            norm, eps = self.kv_norm.weight.get_value(), self.config.rms_eps
            turned = jax.tree.map(lambda a: a[0], turn(rows.positions, self.table))
            place = row[0], rows.start, rows.end, ring[0]
            return kept_row.keep(*place, norm, turned, eps)[None]

        append = lambda row, ring: overwrite(ring, finish(row), rows)  # noqa: E731
        served = len(row) == 1 and self.config.kv_rounding == "none"
        served = served and kept_row.serves(row[0], cache.raw[0])
        raw = by_kernel(append, row, cache.raw, cuda=kernel if served else None)
        return look_at(raw, rows), raw

    def _attend_long(self, query, view, compressed, chosen, rows):
        """Attend with the window of each query or block, not with all of the pass.

        The queries are neither normed nor rotated yet; what is found is rotated back.
        """
        c, sinks = self.config, self.sinks.get_value()
        compressed = [source.seen() for source in compressed]

        def attend_block(query, positions, *visible):
            raw, held = recent(view, positions, c.window)
            others = [(r, v) for (r, _), v in zip(compressed, visible, strict=True)]
            sources = [(raw, sees(positions, held, c.window)), *others]
            return attend(query, sources, sinks, c.dtype)

        def by_blocks(query):
            masks = (visible for _, visible in compressed)
            query = self._prepare_queries(query, rows.positions)
            heads = in_blocks(attend_block, query, rows.positions, *masks)
            return self._rotate_back(heads, rows.positions)

        def kernel(query):
            raw, held = recent(view, rows.positions, c.window)
            source = raw[0], held[0] >= 0
            for those, visible in compressed:
                every = jnp.where(visible, jnp.arange(visible.shape[-1]), -1)
                source += those[0], (every if chosen is None else chosen)[0]
            turned = turn(rows.positions[0], self.table)
            query = long_attention.prepare(query[0], turned, c.rms_eps)
            found = long_attention.attend(
                query, *source, sinks=sinks, turn=turned, groups=c.o_groups
            )
            return found[None].astype(jnp.float32)

        served = len(query) == 1 and c.dtype == "bfloat16"
        served = served and long_attention.serves(query[0], c.window)
        return of_prefill(by_blocks, query, cuda=kernel if served else None)

    @property
    def table(self) -> np.ndarray:
        """The frequencies of the layer's rotations."""
        return frequencies(self.config, compressed=bool(self.ratio))

    def _keep(self, row):
        """Return a row as the cache is to have it."""
        ds4 = self.config.kv_rounding == "ds4"
        return round_kv(row, self.config.rope_dim) if ds4 else row

    def _prepare_queries(self, query, positions):
        """Norm and rotate queries [B, T, H, K]."""
        query = rms(query, self.config.rms_eps)
        return rotate(query, positions[..., None], self.table)

    def _attend(self, query, sources, positions):
        """Return the output's maps of what each head makes of all sources.

        The queries are neither normed nor rotated yet.
        """
        c, sinks = self.config, self.sinks.get_value()
        first, second = self.output_a.get_value(), self.output_b.weight.get_value()
        multiply = two_maps_kernel(first, second, c.o_groups, c.dtype)

        def over_all(query, sources, positions):
            query = self._prepare_queries(query, positions)
            return self._project(self._heads(query, sources, positions))

        def kernel(width, query, sources, positions):
            assert multiply and is_q8_0(first) and is_q8_0(second)
            turned = turn(positions, self.table)
            operands = jax.tree.map(lambda a: a[0], (query, sources, turned))
            query, sources, turned = operands
            given = query, sources, sinks, turned, c.rms_eps
            of_output = attn_out.Maps(first, second, c.o_groups, c.dtype)
            if count := attn_out.programs(query, sources, c.rope_dim, of_output):
                return attn_out.multiply(*given, of_output, width, count)[None]
            return multiply(width, pallas.attend(*given, c.dtype, c.o_groups, width))

        cuda = kernel if multiply and self._is_served(sources) else None
        return by_kernel(over_all, query, sources, positions, cuda=cuda)

    def _heads(self, query, sources, positions):
        """Return what each head makes of all sources, rotated back."""
        seen, sinks = [source.seen() for source in sources], self.sinks.get_value()
        heads = attend(query, seen, sinks, self.config.dtype)
        return self._rotate_back(heads, positions)

    def _rotate_back(self, heads, positions):
        return rotate(heads, positions[..., None], self.table, inverse=True)

    def _project(self, heads):
        """Return the two maps of the output, of which the first is by groups."""
        grouped = heads.reshape(*heads.shape[:2], self.config.o_groups, -1)
        low = grouped_matmul(grouped, self.output_a.get_value(), self.config.dtype)
        return self.output_b(low.reshape(*heads.shape[:2], -1))

    def _is_served(self, sources):
        c, sizes = self.config, [source.visible.shape[-1] for source in sources]
        return pallas.serves(c.heads, c.head_dim, c.rope_dim, sizes)


def _choose(compressed, index, picked, rows):
    """Narrow the compressed rows to the indexer's choice.

    A decode pass gathers them, so its cost does not grow with the context; a longer
    pass masks the others, which costs less than a gather per query.
    """
    if rows.is_decode:
        return Source(compressed, picked, index)
    capacity = compressed.shape[1]
    batch = jnp.arange(compressed.shape[0])[:, None, None]
    row = jnp.arange(rows.width)[:, None]
    mask = jnp.zeros((*index.shape[:2], capacity), bool)
    index = jnp.where(picked, index, capacity)
    return Source(compressed, mask.at[batch, row, index].set(True, mode="drop"))
