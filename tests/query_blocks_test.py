"""Long passes by blocks of queries: what each sees is what it sees all at once."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax import schema
from ds4jax.model import cache as caches
from ds4jax.model import query_blocks
from ds4jax.model.attention import Attention
from ds4jax.model.cache import Rows, extend, extend_tags
from ds4jax.model.layers import scope
from ds4jax.model.query_blocks import in_blocks, recent, sees
from ds4jax.pallas.passes import Prefill, within

WINDOW, RING, WIDTH = 5, 9, 20
ORDER = 1e-5
"""Float32 sums of the same terms, and of others that are 0, in another order."""
same = np.testing.assert_array_equal


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(query_blocks, "BLOCK", 8)


def rows_at(*starts: int) -> Rows:
    start = jnp.asarray(starts, jnp.int32)
    positions = start[:, None] + jnp.arange(WIDTH)
    return Rows(start, jnp.full_like(start, WIDTH), positions, is_decode=False)


@pytest.mark.parametrize("first", [0, 3, 16])
def test_each_query_sees_its_window_and_no_more(first):
    """Rows are their positions.  Seen red with a window one longer."""
    rows = rows_at(0, 2, 30)
    slots = jnp.arange(RING)
    last = rows.start[:, None] - 1
    ring = (last - (last - slots) % RING).astype(jnp.float32)[..., None]
    view, _ = extend(ring, rows.positions.astype(jnp.float32)[..., None], rows)
    queries = rows.positions[:, first : first + 4]
    found, held = recent(view, queries, WINDOW)
    seen = sees(queries, held, WINDOW)
    for b, t in np.ndindex(queries.shape):
        position = int(queries[b, t])
        expected = range(max(position - WINDOW + 1, 0), position + 1)
        same(np.asarray(found)[b, np.asarray(seen)[b, t], 0], list(expected))


def test_a_row_that_no_tag_vouches_for_is_not_seen():
    rows = rows_at(30)
    ring = jnp.zeros((1, RING, 1))
    tags = (
        jnp.full((1, RING), -1).at[0, 29 % RING].set(29).at[0, 28 % RING].set(28 - RING)
    )
    view, _ = extend(ring, jnp.zeros((1, WIDTH, 1)), rows)
    view, _ = extend_tags(tags, view, rows)
    _, held = recent(view, rows.positions[:, :2], WINDOW)
    same(held[0], [-1, -1, -1, 29, 30, 31])


def test_blocks_are_put_together_in_order_and_the_last_is_cut():
    x = jnp.arange(2.0 * WIDTH).reshape(2, WIDTH, 1)
    same(in_blocks(lambda x, y: x + y, x, 2 * x), 3 * x)


@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_attention_by_blocks_and_at_once(ratio, monkeypatch):
    """Of every kind of layer, the second pass over a cache; the indexer picks alike."""
    config = models.micro_config()
    layer = config.compress_ratios.index(ratio)
    weights = models.lively_weights(schema.trunk(config), config, seed=0)
    weights = {k: jnp.asarray(w) for k, w in scope(weights, f"blk.{layer}.").items()}
    x = np.random.default_rng(3).normal(size=(2, 2, WIDTH, config.hidden))

    def two_passes(x):
        attention = Attention(config, ratio, weights)
        cache = caches.empty(config, 64, batch=2, slack=models.SLACK).layers[layer]
        _, cache, _ = attention(x[0], cache, rows_at(0, 0))
        return attention(x[1], cache, rows_at(WIDTH, WIDTH))

    def run(kind):
        with within(kind):
            return jax.jit(lambda x: two_passes(x))(jnp.asarray(x, jnp.float32))

    found, state, chosen = run(Prefill())
    expected, state_at_once, chosen_at_once = run(None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ORDER)
    assert not np.array_equal(found, expected), "blocks were not used"
    if ratio == 4:
        same(chosen, chosen_at_once)
    for a, b in zip(*map(jax.tree.leaves, (state, state_at_once)), strict=True):
        same(a, b)
