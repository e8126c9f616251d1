"""What the indexer learns from: the attention over the rows it chooses among.

Its choice is a top-k, through which no gradient flows.  As in DeepSeek-V3.2 (DSA) it
is trained to imitate attention instead: its scores, as a softmax, are pulled towards
the probability that the heads of its own layer give each compressed row.  Nothing but
the indexer moves for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ds4jax.config import CSA_RATIO
from ds4jax.model.attention import Attention
from ds4jax.model.cache import Rows, blank_invisible
from ds4jax.model.compressor import finished
from ds4jax.model.layers import rms
from ds4jax.model.rope import frequencies, rotate
from ds4jax.model.trunk import Layer, fill_up


def attention_shares(
    attention: Attention,
    x: Float[Array, "B T D"],
    q_lora: Float[Array, "B T Q"],
    rows: Rows,
) -> Float[Array, "B T C"]:
    """Return the mean over heads of the attention among the compressed rows."""
    c = attention.config
    table = frequencies(c, compressed=True)
    query = attention.q_b(q_lora).reshape(*x.shape[:2], c.heads, c.head_dim)
    query = rotate(rms(query, c.rms_eps), rows.positions[..., None], table)
    compressed, _ = attention.compressor(x, None, rows, lambda row: row)
    exists = finished(rows, CSA_RATIO, compressed.shape[1])
    logits = jnp.einsum(
        "bthk,bck->bthc",
        query.astype(c.dtype),
        blank_invisible(compressed, exists).astype(c.dtype),
        preferred_element_type=jnp.float32,
    )
    seen = exists[:, :, None]
    shares = jax.nn.softmax(logits * c.head_dim**-0.5, axis=-1, where=seen)
    return jnp.mean(jnp.where(seen, shares, 0), axis=2)


def indexer_loss(layer: Layer, streams: Float[Array, "B T M D"]) -> Float[Array, ""]:
    """Return the divergence KL(attention || indexer), in nats per query.

    Args:
      layer: a CSA layer.
      streams: what went into it, of sequences from their start.
    """
    x, *_ = layer.hc_attn(jax.lax.stop_gradient(streams), None, layer.attn_norm)
    x = jax.lax.stop_gradient(x)
    attention = layer.attention
    q_lora = jax.lax.stop_gradient(attention.q_norm(attention.q_a(x)))
    _, rows = fill_up(x, None, None)
    target = jax.lax.stop_gradient(attention_shares(attention, x, q_lora, rows))
    score, _ = attention.indexer.scores(x, q_lora, None, rows)
    exists = score > -jnp.inf
    # The first queries see no row: an empty softmax, whose gradient must stay finite.
    score = jnp.where(exists, score, -1e9)
    apart = target * (jnp.log(target + 1e-30) - jax.nn.log_softmax(score))
    return jnp.sum(jnp.where(exists, apart, 0)) / jnp.sum(jnp.any(exists, axis=-1))
