"""The trunk: embedding, layers over M streams, hyper head, LM head.

One forward serves training (no cache), prefill (a cache and many rows) and decoding
(a cache and few rows); `cache.DECODE_ROWS` says where the row contract holds.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int, PyTree

from ds4jax.config import ModelConfig
from ds4jax.model.attention import Attention
from ds4jax.model.attention_input import project_streams
from ds4jax.model.cache import DECODE_ROWS, Cache, LayerCache, Rows, row_at
from ds4jax.model.hyper import HyperConnection, HyperHead, Update
from ds4jax.model.layers import Linear, RMSNorm, Weights, project_normed, scope
from ds4jax.model.moe import MoE
from ds4jax.pallas.passes import (
    DecodePass,
    Pass,
    Prefill,
    is_watched,
    traced_once,
    within,
)
from ds4jax.quant import dequantize


@struct.dataclass
@no_type_check
class Trace:
    """What a pass did inside; XLA drops what a caller does not use.

    Attributes:
      streams: float32 [B, T, M, D] after the embedding and after each layer.
      experts: int32 [B, T, U] of each layer.
      selected: int32 [B, T, N] of each CSA layer, -1 for none; None elsewhere.
    """

    streams: tuple[Array, ...]
    experts: tuple[Array, ...]
    selected: tuple[Array | None, ...]


@struct.dataclass
@no_type_check
class TrunkOutput:
    """Result of a pass.

    Attributes:
      logits: float32 [B, T, V], or [B, 1, V] of the last real rows if only those were
        asked for.
      streams: float32 [B, T, M, D] after the last layer, before the hyper head: what
        the MTP head is conditioned on.
      cache: the state after, or None.
      trace: see Trace.
    """

    logits: Float[Array, "B _ V"]
    streams: Float[Array, "B T M D"]
    cache: Cache | None
    trace: Trace


class Layer(nnx.Module):
    """Attention, then MoE, each inside its own hyper connection."""

    def __init__(self, config: ModelConfig, ratio: int, hashed: bool, weights: Weights):
        self.hc_attn = HyperConnection(config, scope(weights, "hc_attn_"))
        self.attn_norm = RMSNorm(weights["attn_norm.weight"], config.rms_eps)
        self.attention = Attention(config, ratio, weights)
        self.hc_ffn = HyperConnection(config, scope(weights, "hc_ffn_"))
        self.ffn_norm = RMSNorm(weights["ffn_norm.weight"], config.rms_eps)
        self.moe = MoE(config, hashed, weights)

    def __call__(
        self,
        streams: Float[Array, "B T M D"],
        update: Update | None,
        tokens: Int[Array, "B T"],
        cache: LayerCache | None,
        rows: Rows,
    ):
        """Return (streams, update, cache, experts, the indexer's choice or None).

        Args:
          streams: the residual streams.
          update: what is to be merged into them, of the layer before.
          tokens: the rows' ids.
          cache: the layer's state.
          rows: where the rows belong.
        """
        args = streams, update, tokens, cache, rows
        if is_watched():
            return self.run(*args)
        return traced_once(_run_layer, *nnx.split(self), *args)

    def run(self, streams, update, tokens, cache, rows):
        """Do what a call does."""
        projected, streams, *weights = project_streams(
            self.attention.input_maps, self.hc_attn, self.attn_norm, streams, update
        )
        y, cache, selected = self.attention.attend(projected, cache, rows)
        update = Update((y,), *weights)
        parts, experts, streams, *weights = self.moe.of_streams(
            self.hc_ffn, self.ffn_norm, streams, update, tokens
        )
        return streams, Update(parts, *weights), cache, experts, selected


def _run_layer(definition, weights, *args):
    return nnx.merge(definition, weights).run(*args)


def under_contract(width: int, cache: Cache | None, exact: bool = True) -> bool:
    """Say whether a pass of `width` rows is a decode pass (see `cache.DECODE_ROWS`)."""
    return exact and cache is not None and width <= DECODE_ROWS


def fill_up(
    args: PyTree,
    cache: Cache | None,
    count: Int[Array, "B"] | None,
    exact: bool = True,
) -> tuple[PyTree, Rows]:
    """Place a pass's rows after what the cache holds, and fill up a decode pass.

    Args:
      args: inputs [B, T, ...] of the pass.
      cache: the state before, or None for sequences that start here.
      count: how many rows are real; all by default.
      exact: as for the trunk.

    Returns:
      The inputs and rows; of a decode pass, `DECODE_ROWS` of them, the last repeated.
    """
    batch, width = jax.tree.leaves(args)[0].shape[:2]
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    if count is None:
        count = jnp.full_like(start, width)
    offset = jnp.arange(width)
    is_decode = under_contract(width, cache, exact)
    if is_decode:
        offset = jnp.minimum(jnp.arange(DECODE_ROWS), width - 1)
        args = jax.tree.map(lambda x: x[:, offset], args)
    rows = Rows(start, count, start[:, None] + offset, is_decode)
    return seal((args, rows), rows)


def kind_of_pass(width: int, rows: Rows, cache: Cache | None) -> Pass:
    """Return what products may know of a pass of `width` rows before it was filled."""
    if rows.is_decode:
        return DecodePass(width, jnp.maximum(jnp.max(rows.count), 1))
    return None if cache is None else Prefill()


def seal(results: PyTree, rows: Rows) -> PyTree:
    """Return the results of a pass; what becomes of them no longer changes their bits.

    XLA fuses a caller's arithmetic, even a cut to T rows, into what produced its
    operand, and may then sum in another order.  Decode passes are therefore closed at
    both ends, here and in `fill_up`.
    """
    return jax.lax.optimization_barrier(results) if rows.is_decode else results


def each_alone(run, *args: PyTree):
    """Return `run(*args)` computed for one sequence after the other.

    So the shapes of a decode pass, which choose its bits, do not depend on B either.
    """
    alone = jax.tree.map(lambda x: x[:, None], args)
    return jax.tree.map(lambda x: x[:, 0], jax.lax.map(lambda a: run(*a), alone))


class Trunk(nnx.Module):
    """DeepSeek-V4's trunk."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.embedding = nnx.Param(weights["token_embd.weight"])
        self.layers = nnx.List(
            Layer(config, ratio, i < config.hash_layers, scope(weights, f"blk.{i}."))
            for i, ratio in enumerate(config.compress_ratios)
        )
        self.head = HyperHead(config, scope(weights, "output_hc_"))
        self.norm = RMSNorm(weights["output_norm.weight"], config.rms_eps)
        self.output = Linear(weights["output.weight"], config.dtype)
        self.config = config

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the embedding rows of `tokens`."""
        rows = jax.tree.map(lambda plane: plane[tokens], self.embedding.get_value())
        return dequantize(rows)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        count: Int[Array, "B"] | None = None,
        exact: bool = True,
        last: bool = False,
    ) -> TrunkOutput:
        """Run the trunk on the next T tokens of each sequence.

        Args:
          tokens: ids; the first follows what `cache` holds.
          cache: the state before; None for whole sequences that keep no state.
          count: how many of the T tokens are real; the rest leave no trace in the
            cache, and their outputs mean nothing.  All, by default.
          exact: static; keep a short pass under the row contract.  Otherwise it is
            computed like a longer one, with no row added, and may round otherwise.
          last: static; only the logits of the last real row are wanted.
        """
        batch, width = tokens.shape
        if batch > 1 and under_contract(width, cache, exact):
            run = functools.partial(self, last=last)
            return each_alone(run, tokens, cache, count)
        tokens, rows = fill_up(tokens, cache, count, exact)
        with within(kind_of_pass(width, rows, cache)):
            out = self._run(tokens, cache, rows, last and not rows.is_decode)
        logits, cache, trace = seal(out, rows)
        if last and rows.is_decode:
            logits = row_at(logits, rows.count - 1)[:, None]
        trace = jax.tree.map(lambda x: x[:, :width], trace)
        return TrunkOutput(logits[:, :width], trace.streams[-1], cache, trace)

    def _run(self, tokens, cache, rows, last):
        """Return the logits, the state after and the trace of a pass's rows."""
        streams = jnp.repeat(
            self.embed(tokens)[:, :, None], self.config.hc_streams, axis=2
        )
        states, trace, update = [], Trace((streams,), (), ()), None
        for i, layer in enumerate(self.layers):
            state = cache and cache.layers[i]
            streams, update, state, experts, selected = layer(
                streams, update, tokens, state, rows
            )
            states.append(state)
            trace = Trace(
                (*trace.streams, update.merged(streams)),
                (*trace.experts, experts),
                (*trace.selected, selected),
            )
        final = trace.streams[-1]
        if last:
            final = row_at(final, rows.count - 1)[:, None]
        logits = project_normed(self.head(final), self.norm, self.output)
        if cache is not None:
            cache = Cache(tuple(states), rows.end)
        return logits, cache, trace
