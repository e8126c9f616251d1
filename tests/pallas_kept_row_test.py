"""The kernel that keeps rows, interpreted, against XLA's code."""

import collections
import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_compressor_test import rows_of

from ds4jax.config import ModelConfig
from ds4jax.model import cache as caches
from ds4jax.model.attention import Attention
from ds4jax.model.cache import DECODE_ROWS, LayerCache, Rows
from ds4jax.model.rope import frequencies, turn
from ds4jax.pallas import kept_row
from ds4jax.pallas.passes import DecodePass, within

CONFIG = ModelConfig.flash()
WIDTH, SLOTS = 128, 24
WIDTHS = [1, 8, 3, 0, 5, 8, 2, 7]
NEAR = 1e-5
"""A norm of 128 channels, summed in another order, and angles; values are near 1."""
same = np.testing.assert_array_equal


def drawn(*shape: int) -> jax.Array:
    x = np.random.default_rng(len(shape)).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


@functools.partial(jax.jit, static_argnames="interpret")
def keep(
    row: jax.Array, ring: jax.Array, start: int, count: int, interpret: bool = True
) -> jax.Array:
    rows, table = rows_of(start, count), frequencies(CONFIG, compressed=False)
    turned = jax.tree.map(lambda a: a[0], turn(rows.positions, table))
    operands = row, rows.start, rows.end, ring, drawn(WIDTH), turned, 1e-6
    return kept_row.keep(*operands, interpret=interpret)


def attention() -> Attention:
    """Return one that has nothing but what keeps rows."""
    weights = collections.defaultdict(lambda: jnp.zeros(()))
    weights["attn_kv_a_norm.weight"] = drawn(WIDTH)
    return Attention(CONFIG, 0, weights)


def expected(row: jax.Array, ring: jax.Array, start: int, count: int) -> jax.Array:
    cache = LayerCache(ring[None])
    view, after = attention().append(row[None], cache, rows_of(start, count))
    assert after is not None
    same(view.rows, after)
    return after[0]


def filled(widths: list[int], step) -> jax.Array:
    """Return the ring after a text in passes of `widths`."""
    x, start = drawn(sum(widths), WIDTH), 0
    ring = jnp.full((SLOTS, WIDTH), jnp.nan)
    for width in widths:
        offset = jnp.clip(jnp.arange(DECODE_ROWS), 0, max(width - 1, 0))
        ring = step(x[start + offset], ring, start, width)
        start += width
    return ring


def test_a_text_leaves_the_ring_that_xla_leaves():
    """Passes of many widths, and one of no row, until the ring has wrapped.

    Seen red with the row after the last one kept, with no rotation, and unnormed.
    """
    wanted = filled(WIDTHS, expected)
    assert not np.any(np.isnan(wanted))
    np.testing.assert_allclose(filled(WIDTHS, keep), wanted, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_the_ring_has_the_bits_of_one_row_at_a_time(width):
    same(filled([width] * (24 // width), keep), filled([1] * 24, keep))


def test_what_it_serves():
    row, ring = jnp.zeros((DECODE_ROWS, WIDTH)), jnp.zeros((DECODE_ROWS, WIDTH))
    assert kept_row.serves(row, ring)
    assert not kept_row.serves(row, ring[1:])
    assert not kept_row.serves(row[:, :96], ring[:, :96])
    assert not kept_row.serves(row[:, :64], ring[:, :64])


def test_attention_has_it_in_decode_passes_on_a_gpu():
    """Of the shape of Flash, and nowhere else."""
    state = jax.eval_shape(lambda: caches.empty(CONFIG, 256))
    row = jnp.zeros((1, DECODE_ROWS, CONFIG.head_dim))

    def text(ring, kind):
        def run(row, ring, start):
            layer = attention()
            layer.kv_norm.weight.set_value(jnp.ones(CONFIG.head_dim))
            count = jnp.ones_like(start)
            positions = start[:, None] + jnp.arange(DECODE_ROWS)
            rows = Rows(start, count, positions, is_decode=True)
            with within(kind):
                return layer.append(row, LayerCache(ring), rows)[1]

        return hopper.lowered(run, row, ring, jnp.zeros(1, jnp.int32))

    ring = state.layers[0].raw
    assert "keep_512" in text(ring, DecodePass(2, jnp.int32(2)))
    assert "keep_512" not in text(ring, None)
