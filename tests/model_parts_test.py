"""Parts of a layer, each by itself, against a restatement in float64 or by hand.

The golden vectors check the parts together; here each claim is made where a mistake in
it would show, on examples that the golden model does not have.
"""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from parts import ULPS, close, normal, part, plain, same, sigmoid

from ds4jax.config import ModelConfig
from ds4jax.model.attention import attend
from ds4jax.model.cache import Rows, blank_invisible
from ds4jax.model.compressor import Compressor
from ds4jax.model.hyper import HyperConnection, HyperHead, Update, sinkhorn
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import RMSNorm, rms
from ds4jax.model.rope import frequencies, rotate

MOST_EPS_CAN_TAKE = 1e-4
"""Of a column's sum, which is divided by itself plus 1e-6 and was 0.01 or more."""

FLASH = ModelConfig.flash()
MICRO = models.micro_config()


def whole(width: int) -> Rows:
    """Return the rows of one text of `width` tokens."""
    counts = jnp.array([width]), jnp.arange(width)[None]
    return Rows(jnp.array([0]), *counts, is_decode=False)


def norm64(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def rope64(x: np.ndarray, position, table: np.ndarray) -> np.ndarray:
    """Rotate by multiplying complex numbers."""
    kept, turned = np.split(x.astype(np.float64), [x.shape[-1] - 2 * len(table)], -1)
    pairs = turned[..., 0::2] + 1j * turned[..., 1::2]
    pairs = pairs * np.exp(1j * position * table.astype(np.float64))
    turned = np.stack([pairs.real, pairs.imag], -1).reshape(turned.shape)
    return np.concatenate([kept, turned], -1)


def test_dense_table():
    expected = [10000 ** (-2 * pair / 64) for pair in range(32)]
    np.testing.assert_allclose(frequencies(FLASH, False), expected, rtol=ULPS)


def test_compressed_table_ramps_from_pair_15_to_25():
    table = frequencies(FLASH, True)
    plain = np.array([160000 ** (-2 * pair / 64) for pair in range(32)])
    expected = plain.copy()
    expected[25:] /= 16
    for pair in range(15, 25):
        share = (pair - 15) / 10
        expected[pair] = plain[pair] * (1 - share) + plain[pair] / 16 * share
    np.testing.assert_allclose(table, expected, rtol=ULPS)
    assert table[16] < 0.95 * plain[16] and table[24] > 1.5 * plain[24] / 16


@pytest.mark.parametrize("compressed", [False, True])
def test_rotation_has_no_magnitude_factor(compressed):
    x, table = normal(0, 5, 64), frequencies(FLASH, compressed)
    found = rotate(x, jnp.array([0, 1, 77, 4096, 10**6]), table)
    length = functools.partial(np.linalg.norm, axis=-1)
    np.testing.assert_allclose(length(found), length(x), rtol=ULPS)


def test_rotation_of_interleaved_pairs_of_the_last_channels():
    x, table = normal(1, 3, 4, 24), frequencies(MICRO, True)
    positions = np.array([2, 5, 11])
    found = rotate(x, jnp.asarray(positions)[:, None], table)
    close(found, rope64(np.asarray(x), positions[:, None, None], table))
    same(found[..., :8], x[..., :8])
    assert np.all(np.asarray(found[..., 8:10]) != np.asarray(x[..., 8:10]))
    # By hand: (1, 0) at an angle of 1 x 1.
    pair = rotate(jnp.array([[9.0, 1.0, 0.0]]), jnp.array([1]), np.ones(1, "f4"))
    close(pair, [[9, np.cos(1), np.sin(1)]])


def test_position_zero_is_the_identity():
    x, start = normal(2, 3, 64), jnp.zeros(3, jnp.int32)
    for inverse in (False, True):
        same(rotate(x, start, frequencies(FLASH, True), inverse), x)


def test_the_inverse_undoes_a_rotation():
    x, table = normal(3, 4, 512), frequencies(FLASH, True)
    positions = jnp.array([1, 130, 5000, 10**6])
    turned = rotate(x, positions, table)
    close(rotate(turned, positions, table, inverse=True), x)
    close(rotate(rotate(x, positions, table, inverse=True), positions, table), x)
    assert np.abs(np.asarray(turned - x)[:, 448:]).max() > 1


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_sinkhorn_normalises_rows_once_less_than_columns(iterations, eps):
    logits = 2 * normal(4, 7, 4, 4)
    mix = np.exp(np.asarray(logits, np.float64))
    mix = mix / mix.sum(2, keepdims=True) + eps
    for step in range(2 * iterations - 1):
        mix = mix / (mix.sum(2 if step % 2 else 1, keepdims=True) + eps)
    found = np.asarray(sinkhorn(logits, iterations, eps))
    close(found, mix)
    if eps == 1e-6:
        np.testing.assert_allclose(found.sum(1), 1, atol=MOST_EPS_CAN_TAKE)
        assert iterations == 20 or np.abs(found.sum(2) - 1).max() > 0.01


def test_merge_sums_over_the_first_index_of_mix():
    streams = jnp.array([10.0, 1.0]).reshape(1, 1, 2, 1)
    mix = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    parts = tuple(jnp.full((1, 1, 1), part) for part in (70.0, 30.0))
    post = jnp.array([[[1.0, 2.0]]])
    found = Update(parts, post, mix).merged(streams)
    same(found.reshape(2), [100 * 1 + 10 * 1 + 1 * 3, 100 * 2 + 10 * 2 + 1 * 4])


HYPER = models.micro_config(hc_eps=0.01)
"""With an epsilon that shows."""


def test_maps_of_a_hyper_connection():
    weights = part(HYPER, "blk.1.hc_attn_")
    streams = 3 * normal(5, 1, 3, 4, 64)
    gain = normal(6, 64)
    norm = RMSNorm(gain, HYPER.rms_eps)
    x, _, streams, post, mix = HyperConnection(HYPER, weights)(streams, None, norm)
    weights = plain(weights)
    flat = np.asarray(streams, np.float64)
    maps = norm64(flat.reshape(1, 3, -1), HYPER.rms_eps) @ weights["fn.weight"].T
    maps = (
        maps * np.repeat(weights["scale.weight"], [4, 4, 16]) + weights["base.weight"]
    )
    pre = sigmoid(maps[..., :4]) + HYPER.hc_eps
    read = norm64(np.einsum("btm,btmd->btd", pre, flat), HYPER.rms_eps)
    close(x, read * np.asarray(gain, np.float64))
    close(post, 2 * sigmoid(maps[..., 4:8]))
    logits = jnp.asarray(maps[..., 8:].reshape(1, 3, 4, 4), jnp.float32)
    close(mix, sinkhorn(logits, HYPER.sinkhorn_iters, HYPER.hc_eps))


def test_the_head_has_neither_sinkhorn_nor_a_factor_of_two():
    weights, streams = part(HYPER, "output_hc_"), 3 * normal(5, 1, 3, 4, 64)
    found = HyperHead(HYPER, weights)(streams)
    weights, flat = plain(weights), np.asarray(streams, np.float64)
    maps = norm64(flat.reshape(1, 3, -1), HYPER.rms_eps) @ weights["fn.weight"].T
    maps = maps * weights["scale.weight"] + weights["base.weight"]
    close(found, np.einsum("btm,btmd->btd", sigmoid(maps) + HYPER.hc_eps, flat))


def compressed64(weights, x, ratio: int, width: int, config: ModelConfig):
    """Return the rows of a text `x [T, D]`: a loop over windows and candidates."""
    w = plain(weights)
    value = x @ w["kv.weight"].T
    gate = x @ w["gate.weight"].T + w["ape.weight"][np.arange(len(x)) % ratio]
    rows = []
    for window in range(len(x) // ratio):
        tokens = range(ratio * window, ratio * (window + 1))
        candidates = [(value[t], gate[t]) for t in tokens]
        if ratio == 4:
            candidates = [(v[width:], g[width:]) for v, g in candidates]
            before = range(max(ratio * (window - 1), 0), ratio * window)
            candidates += [(value[t][:width], gate[t][:width]) for t in before]
        values, gates = map(np.array, zip(*candidates, strict=True))
        share = np.exp(gates) / np.exp(gates).sum(0)
        row = norm64((share * values).sum(0), config.rms_eps) * w["norm.weight"]
        rows.append(rope64(row, ratio * window, frequencies(config, True)))
    return np.array(rows)


@pytest.mark.parametrize("ratio, tokens", [(4, 14), (4, 4), (5, 14), (16, 35)])
def test_compressed_rows(ratio, tokens):
    """In CSA the first window has no other before it; unfinished ones give no row."""
    config = models.micro_config(compress_ratios=(0, 0, ratio))
    weights, x = part(config, "blk.2.attn_compressor_"), normal(8, 1, tokens, 64)
    compressor = Compressor(config, ratio, 32, weights)
    run = jax.jit(lambda x: compressor(x, None, whole(tokens), lambda row: row))
    found, state = run(x)
    expected = compressed64(weights, np.asarray(x[0], "f8"), ratio, 32, config)
    done = tokens // ratio
    assert state is None and len(expected) == done
    close(found[0, :done], expected)
    assert not np.asarray(found[0, done:]).any()


def test_zero_scores_are_taken_from_the_lowest_index():
    """One head, whose ReLU makes about half of the scores 0."""
    config, tokens = models.micro_config(index_heads=1), 48
    weights, x = part(config, "blk.1."), normal(9, 1, tokens, 64)
    indexer, q_lora = Indexer(config, weights), normal(10, 1, tokens, 32)
    inputs = x, q_lora, None, whole(tokens)
    index, picked, _ = jax.jit(indexer)(*inputs)
    score = np.asarray(jax.jit(indexer.scores)(*inputs)[0][0])

    keys = part(config, "blk.1.indexer_compressor_")
    keys = compressed64(keys, np.asarray(x[0], "f8"), 4, 16, config)
    w, zeros = plain(weights), 0
    for t in range(tokens):
        count = (t + 1) // 4
        query = w["indexer.attn_q_b.weight"] @ np.asarray(q_lora[0, t])
        query = rope64(query, t, frequencies(config, True))
        share = (w["indexer.proj.weight"] @ np.asarray(x[0, t])) / 16**0.5
        close(score[t, :count], share * np.maximum(keys[:count] @ query, 0))
        assert np.isneginf(score[t, count:]).all()
        order = np.argsort(-score[t], kind="stable")[:4]
        same(picked[0, t], np.arange(4) < count)
        same(index[0, t][:count], order[:count])
        zeros += count > 4 and score[t][np.argsort(-score[t])[3:5]].any() == 0
    assert zeros > 5  # the last in and the first out were 0


def one_row(value: float, sink: float):
    query = jnp.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    row = jnp.array([value, 1.0, 5.0, 0.0])
    expected = 1 / (1 + np.exp(sink - (value + 2) / 2))
    return query, row, jnp.array([sink]), expected * np.asarray(row)


@pytest.mark.parametrize("value, sink", [(1.0, 0.0), (-3.0, 2.0), (200.0, -5.0)])
def test_a_sink_takes_probability_and_gives_no_value(value, sink):
    query, row, sinks, expected = one_row(value, sink)
    visible = jnp.array([[[True]]])
    found = attend(query, [(row.reshape(1, 1, 4), visible)], sinks, "float32")
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=ULPS)
    nothing = attend(query, [(row.reshape(1, 1, 4), ~visible)], sinks, "float32")
    same(nothing, np.zeros((1, 1, 1, 4)))


def test_one_softmax_over_all_sources():
    """A row counts alike in either source, shared by the queries or of each its own."""
    query, rows, sinks = normal(11, 1, 2, 3, 8), normal(12, 1, 5, 8), normal(13, 3)
    seen = jnp.array([[[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]]], bool)
    q, u = np.asarray(query[0], np.float64), np.asarray(rows[0], np.float64)
    weight = np.exp(np.einsum("thk,sk->ths", q, u) / 8**0.5) * seen[0][:, None]
    total = weight.sum(-1) + np.exp(sinks)
    expected = np.einsum("ths,sk->thk", weight, u) / total[..., None]
    own = jnp.broadcast_to(rows[:, None, 2:], (1, 2, 3, 8))
    sources = [(rows[:, :2], seen[..., :2]), (own, seen[..., 2:])]
    close(attend(query, sources, sinks, "float32")[0], expected)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_what_rows_hold_that_no_query_sees_changes_nothing(garbage):
    query, rows, sinks = normal(14, 1, 2, 3, 8), normal(15, 1, 5, 8), normal(16, 3)
    seen = jnp.array([[[1, 1, 0, 1, 0], [1, 0, 0, 1, 0]]], bool)
    see = lambda rows: attend(  # noqa: E731
        query, [(blank_invisible(rows, seen), seen)], sinks, "float32"
    )
    expected = see(rows)
    same(see(rows.at[:, 2].set(garbage).at[:, 4].set(-garbage)), expected)
    assert np.isfinite(expected).all()


def test_rms_has_epsilon_inside_the_root():
    x = normal(17, 3, 64) * jnp.array([[1.0], [1e-4], [0.0]])
    close(rms(x, 1e-6), norm64(np.asarray(x, np.float64), 1e-6))
