"""The kernels of prefill, for `kernel_times.py`: 4,096 rows after as many others.

As in `kernel_parts.py`, a case is a function of the model with and without its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import kernel_parts
from kernel_case import Case, choice, normal
from kernel_parts import (
    CONFIG,
    CSA,
    DENSE,
    dense_attention,
    padded,
    place,
    weights,
)

from ds4jax.model import hyper
from ds4jax.model.attention import Source
from ds4jax.model.cache import DEFAULT_SLACK, Rows, extend
from ds4jax.model.compressor import finished
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import Linear, scope
from ds4jax.model.moe import MoE
from ds4jax.pallas import (
    expert_tiles,
    hyper_connection,
    long_attention,
    long_index,
    stream_maps,
)
from ds4jax.pallas.passes import Prefill

ROWS = 4096


def part(
    kernel: ModuleType,
    what: str,
    draw: Callable[[], tuple[Any, ...]],
    run: Callable[..., Any],
    nbytes: Callable[..., float],
) -> Case:
    """Return the case of a part of prefill."""
    return kernel_parts.part(
        kernel, what, draw, lambda _, *operands: run(*operands), nbytes,
        kind=lambda width: Prefill(), widths=(ROWS,),
    )  # fmt: skip


def long_rows(start: jax.Array) -> Rows:
    """Return the rows of a long pass at `start`, [1]."""
    positions = start[:, None] + jnp.arange(ROWS)
    return Rows(start, jnp.full_like(start, ROWS), positions, is_decode=False)


def experts(plan: str) -> Case:
    """Return the case of a layer's routed experts."""

    def draw():
        own = weights(
            DENSE, *(f"ffn_{n}_exps" for n in ("gate", "up", "down")), plan=plan
        )
        chosen = choice(1, ROWS, CONFIG.experts, CONFIG.experts_used)
        x, share = normal(0, 1, ROWS, CONFIG.hidden), normal(2, *chosen.shape)
        return own, x, chosen, share

    def run(own, x, chosen, share):
        return MoE(CONFIG, False, padded(own))._routed(x, chosen, share)

    def nbytes(width, own, x, chosen, share):
        return sum(w.nbytes for w in own.values()) + x.nbytes

    return part(expert_tiles, f"routed experts, {plan}", draw, run, nbytes)


def attended(what: str, ratio: int = 0) -> Case:
    """Return the case of attention in a layer of a ratio."""
    k = CONFIG.head_dim

    def draw():
        start = place(ROWS)
        rows = long_rows(start)
        ring = normal(0, 1, CONFIG.window + DEFAULT_SLACK, k)
        view, _ = extend(ring, normal(1, 1, ROWS, k), rows)
        sources, chosen = [], None
        if ratio:
            count = 2 * ROWS // ratio
            visible = finished(rows, ratio, count)
            if ratio == CONFIG.compress_ratios[CSA]:
                # Of the rows that all queries see.
                chosen = choice(2, ROWS, ROWS // ratio, CONFIG.index_topk)
                row = jnp.arange(ROWS)[:, None]
                visible = jnp.zeros_like(visible).at[:, row, chosen[0]].set(True)
            sources = [Source(normal(3, 1, count, k), visible)]
        query = normal(4, 1, ROWS, CONFIG.heads, k)
        return weights(DENSE, "attn_sinks"), query, view, sources, chosen, start

    def run(own, query, view, sources, chosen, start):
        attention = dense_attention(own)
        return attention._attend_long(query, view, sources, chosen, long_rows(start))

    def nbytes(width, own, query, view, sources, chosen, start):
        return query.nbytes + sum(x.rows.nbytes for x in (view, *sources))

    return part(long_attention, f"attend, {what}", draw, run, nbytes)


def scored() -> Case:
    """Return the case of an indexer's scores."""
    c = CONFIG

    def draw():
        query = normal(0, 1, ROWS, c.index_heads, c.index_dim)
        keys = normal(1, 1, 2 * ROWS // c.compress_ratios[CSA], c.index_dim)
        share = normal(2, 1, ROWS, c.index_heads)
        return weights(CSA, "indexer"), query, share, keys, place(ROWS)

    def run(own, query, share, keys, start):
        return Indexer(c, own)._score(query, share, keys, long_rows(start))

    def nbytes(width, own, query, share, keys, start):
        return query.nbytes + share.nbytes + keys.nbytes

    return part(long_index, "scores", draw, run, nbytes)


def chosen() -> Case:
    """Return the case of an indexer's choice."""
    c, count = CONFIG, 2 * ROWS // CONFIG.compress_ratios[CSA]

    def draw():
        exists = finished(long_rows(place(ROWS)), c.compress_ratios[CSA], count)
        score = jnp.where(exists, normal(0, 1, ROWS, count), -jnp.inf)
        return weights(CSA, "indexer"), score

    def run(own, score):
        return Indexer(c, own)._best(score, c.index_topk)

    return part(long_index, "choice", draw, run, lambda width, own, score: score.nbytes)


def mixed() -> Case:
    """Return the case of a hyper connection's Sinkhorn iterations."""

    def draw():
        logits = normal(0, 1, ROWS, CONFIG.hc_streams, CONFIG.hc_streams)
        return weights(DENSE, "hc_attn_"), logits

    def run(own, logits):
        connection = hyper.HyperConnection(CONFIG, scope(own, "hc_attn_"))
        return connection._sinkhorn(logits)

    def nbytes(width, own, logits):
        return 2 * logits.nbytes

    return part(hyper_connection, "Sinkhorn", draw, run, nbytes)


def mapped() -> Case:
    """Return the case of the map of a hyper connection."""

    def draw():
        streams = normal(0, 1, ROWS, CONFIG.hc_streams, CONFIG.hidden)
        return weights(DENSE, "hc_attn_fn"), streams

    def run(own, streams):
        fn = Linear(own["hc_attn_fn.weight"])
        return hyper._maps(fn, streams, CONFIG.rms_eps)

    def nbytes(width, own, streams):
        return own["hc_attn_fn.weight"].nbytes + streams.nbytes

    return part(stream_maps, "maps", draw, run, nbytes)


CASES = [
    experts("ds4-q2"),
    experts("ds4-q4"),
    attended("dense"),
    attended("CSA", 4),
    attended("HCA", 128),
    scored(),
    chosen(),
    mapped(),
    mixed(),
]
