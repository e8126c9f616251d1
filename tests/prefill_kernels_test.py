"""Kernels of long passes, not the experts', interpreted: against what they stand for.

`gpu_test.py` has what only a GPU can show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model.attention import attend
from ds4jax.model.hyper import sinkhorn
from ds4jax.model.layers import rms
from ds4jax.model.query_blocks import sees
from ds4jax.model.rope import rotate, turn
from ds4jax.pallas import hyper_connection, long_attention, long_index, stream_maps

QUERIES, HEADS, WIDTH, WINDOW, CAPACITY, MOST = 6, 16, 64, 64, 40, 24
EPS, FREQUENCIES = 0.1, np.array([1, 0.5, 0.25, 0.1], np.float32)
ROUNDED = 2e-2
"""Weights are rounded to bfloat16, of results of size 1, under another peak, and the
result is, which is up to 3."""
FLOAT32 = 2.0**-23
"""Of the sum of the magnitudes: operands are exact to 2^-24, errors of sums cancel."""


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("chooses", [False, True])
def test_attention(chooses):
    """Queries near a text's start, of which one chose nothing and others little.

    Seen red with the window one row off, and with what was found not rotated back.
    """
    query, sinks = normal(0, QUERIES, HEADS, WIDTH), normal(1, HEADS)
    recent = normal(2, QUERIES + WINDOW - 1, WIDTH)
    held = jnp.arange(len(recent)) - 11
    positions = held[WINDOW - 1 :]
    sources = [(recent, sees(positions[None], held[None], WINDOW)[0])]
    args = [recent, held >= 0]
    if chooses:
        rng = np.random.default_rng(3)
        index = np.stack([rng.permutation(CAPACITY)[:MOST] for _ in positions])
        index[0], index[1, 5:] = -1, -1
        seen = np.stack([np.isin(np.arange(CAPACITY), row) for row in index])
        compressed = normal(4, CAPACITY, WIDTH)
        sources.append((compressed, jnp.asarray(seen)))
        args += [compressed, jnp.asarray(index)]
    assert long_attention.serves(query, WINDOW)
    query = query.astype(jnp.bfloat16)
    found = long_attention.attend(
        query, *args, sinks=sinks, turn=turn(positions, FREQUENCIES), groups=2,
        interpret=True,
    )  # fmt: skip
    assert found.dtype == jnp.bfloat16
    batch = [(rows[None], visible[None]) for rows, visible in sources]
    heads = attend(query[None], batch, sinks, "bfloat16")[0]
    expected = rotate(heads, positions[:, None], FREQUENCIES, inverse=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDED)


def test_queries_of_attention():
    """Seen red with the pairs as they are."""
    query, positions = normal(0, QUERIES, HEADS, WIDTH), 5 + jnp.arange(QUERIES)
    angles = turn(positions, FREQUENCIES)
    found = long_attention.prepare(query, angles, EPS, interpret=True)
    expected = rotate(rms(query, EPS), positions[:, None], FREQUENCIES)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)


def test_scores():
    """Seen red without the rectifier.  Of keys that a query has not, anything goes."""
    query, share = normal(0, QUERIES, HEADS, WIDTH), normal(1, QUERIES, HEADS)
    keys, count = normal(2, 250, WIDTH), jnp.asarray([0, 1, 127, 128, 129, 250])
    assert long_index.serves(query, keys)
    found = long_index.scores(query, keys, share, count, interpret=True)
    q, k = (np.asarray(x.astype("bfloat16"), np.float64) for x in (query, keys))
    match = np.maximum(np.einsum("tij,cj->tic", q, k), 0)
    expected = np.einsum("ti,tic->tc", share, match)
    worst = FLOAT32 * np.einsum("ti,tij,cj->tc", abs(share), abs(q), abs(k))
    has = np.arange(250) < np.asarray(count)[:, None]
    assert np.all(abs(found - expected)[has] <= worst[has])


def test_choice():
    """Of scores that are often alike, some fewer than are chosen, one row without any.

    Seen red with one of those that are alike too many.
    """
    scores = jnp.round(normal(0, QUERIES, CAPACITY))
    scores = scores.at[1, 5:].set(-jnp.inf).at[2].set(-jnp.inf)
    assert long_index.serves_choice(scores)
    found = long_index.choose(scores, MOST, interpret=True)
    best, index = jax.lax.top_k(scores, MOST)
    index = jnp.sort(jnp.where(best > -jnp.inf, index, CAPACITY), axis=1)
    np.testing.assert_array_equal(found, jnp.where(index < CAPACITY, index, -1))


def test_maps():
    """Seen red with operands of bfloat16, in one piece or in two."""
    x, fn = normal(0, 64, 1024), normal(1, 24, 1024).astype(jnp.float16)
    assert stream_maps.serves(x)
    found = stream_maps.product(x, fn, 0.01, interpret=True)
    x, fn = np.asarray(x, np.float64), np.asarray(fn, np.float64)
    x /= np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.01)
    assert np.all(abs(found - x @ fn.T) <= FLOAT32 * (abs(x) @ abs(fn.T)))


def test_sinkhorn():
    """Seen red with one iteration less."""
    logits = normal(0, 64, 4, 4)
    assert hyper_connection.serves_sinkhorn(logits)
    found = hyper_connection.sinkhorn(logits, 3, 0.01, interpret=True)
    np.testing.assert_allclose(found, sinkhorn(logits, 3, 0.01), rtol=8 * FLOAT32)
