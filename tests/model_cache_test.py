"""The cache: rings that hold the right row of every position, and rollback for free.

The rings are compared with plain lists; whole models, bit for bit, with decoding that
never went astray.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, assert_same_state, fresh, lively, mtp, poison, text

from ds4jax.config import ModelConfig
from ds4jax.errors import CapacityError, ConfigError
from ds4jax.model import cache as caches
from ds4jax.model.cache import DECODE_ROWS, Rows
from ds4jax.model.compressor import finished

SIGHT, SLACK, BATCH = 5, 9, 2
SIZE = SIGHT + SLACK
same = np.testing.assert_array_equal


def rows_at(start, count, width: int) -> Rows:
    start, count = jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)
    is_decode = width <= DECODE_ROWS
    return Rows(start, count, start[:, None] + jnp.arange(width), is_decode)


@jax.jit
def append(ring, new, rows):
    """Return the view, the ring after, and what each query takes: its last rows."""
    view, after = caches.extend(ring, new, rows)
    wanted = rows.positions[..., None] - jnp.arange(SIGHT)
    taken = view.take(wanted.reshape(BATCH, -1))
    return view, after, taken.reshape(*wanted.shape)


class Texts:
    """A ring of one number per token, and the lists that it should hold."""

    def __init__(self):
        self.ring = jnp.zeros((BATCH, SIZE))
        self.lists: list[list[float]] = [[] for _ in range(BATCH)]
        self.longest = [0] * BATCH
        self.stamp = 0

    def roll_back(self, tokens):
        """Forget tokens of each text, as many as the slack has left."""
        for i, rows in enumerate(self.lists):
            left = SLACK - (self.longest[i] - len(rows))
            del rows[max(len(rows) - min(tokens[i], left), 0) :]

    def append(self, width, counts):
        """Append rows that no pass had before, and look at them as attention does."""
        starts = [len(rows) for rows in self.lists]
        new = 1.0 + self.stamp + np.arange(BATCH * width).reshape(BATCH, width)
        self.stamp += BATCH * width
        rows = rows_at(starts, counts, width)
        found = append(self.ring, jnp.asarray(new, jnp.float32), rows)
        view, self.ring, taken = jax.tree.map(np.asarray, found)
        for i, history in enumerate(self.lists):
            history += new[i, : counts[i]].tolist()
            self.longest[i] = max(self.longest[i], len(history))
            for row in range(counts[i]):
                now = starts[i] + row
                seen = list(range(max(now - SIGHT + 1, 0), now + 1))
                expected = [history[t] for t in seen]
                same(taken[i, row, : len(seen)][::-1], expected)
                # What attention's mask leaves is each of these positions, once.
                age = now - view.positions[i]
                visible = (view.positions[i] >= 0) & (age >= 0) & (age < SIGHT)
                order = np.argsort(view.positions[i][visible])
                same(view.positions[i][visible][order], seen)
                same(view.rows[i][visible][order], expected)
            # A rollback over all the slack would still find what it needs.
            for t in range(max(self.longest[i] - SIZE, 0), len(history)):
                assert self.ring[i, t % SIZE] == history[t]


WIDTHS = (DECODE_ROWS, DECODE_ROWS + 1, 13, 31)
"""A decode pass, and prefill passes shorter and longer than the ring."""
passes = st.sampled_from(WIDTHS).flatmap(
    lambda width: st.tuples(st.just(width), st.tuples(*[st.integers(0, width)] * BATCH))
)
rollbacks = st.tuples(st.just(0), st.tuples(*[st.integers(0, SLACK)] * BATCH))


@given(st.lists(passes | rollbacks, max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_passes_and_rollbacks_leave_the_right_rows(steps):
    texts = Texts()
    for width, counts in steps:
        if width:
            texts.append(width, counts)
        else:
            texts.roll_back(counts)


def test_rollback_over_all_the_slack_at_every_position():
    texts = Texts()
    for _ in range(3 * SIZE):
        texts.append(DECODE_ROWS, (8, 1))
        texts.append(DECODE_ROWS, (1, 8))
        texts.roll_back((SLACK, SLACK))
        texts.append(DECODE_ROWS, (1, 1))


def test_without_a_ring_the_pass_sees_itself():
    new, rows = jnp.arange(12.0).reshape(2, 6), rows_at([0, 7], [6, 4], 6)
    view, after = caches.extend(None, new, rows)
    assert after is None
    wanted = jnp.array([[0, 5, 3], [8, 9, 10]])
    same(view.take(wanted), [[0, 5, 3], [7, 8, 9]])
    same(view.positions, rows.positions)


def test_scatter_drops_what_lies_outside():
    store = jnp.zeros((2, 4, 1))
    index = jnp.array([[-1, 1, 4], [3, 99, -5]])
    new = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    found = caches.scatter(store, index, new)
    same(found[..., 0], [[0, 2, 0, 0], [0, 0, 0, 4]])


@pytest.mark.parametrize("ratio", [1, 4, 16])
def test_a_row_is_finished_for_the_query_that_ends_its_window(ratio):
    starts, counts = [0, 3, 30, 61], [8, 0, 5, 8]
    found = np.asarray(finished(rows_at(starts, counts, 8), ratio, 70))
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for row in range(8):
            last = min(start + row, start + count - 1)  # padding sees no more
            ends = ratio * np.arange(70) + ratio - 1
            same(found[i, row], ends <= last)


@pytest.mark.parametrize(
    "config", [models.micro_config(), ModelConfig.tiny()], ids=["micro", "tiny"]
)
@pytest.mark.parametrize("context", [1, 15, 500])
def test_nbytes_is_what_is_allocated(config, context):
    for head, ratios in ((False, None), (True, (0,))):
        cache = caches.empty(config, context, ratios=ratios, tagged=head)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert cache.nbytes == caches.nbytes(config, context, head) == held


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 15, 16, 17, 40, 95])
@pytest.mark.parametrize("head", [False, True])
def test_live_bytes_are_those_that_poison_spares(length, head):
    config = models.micro_config()
    empty = fresh(config, mtp=head)
    cache = dataclasses.replace(empty, length=jnp.array([length], jnp.int32))
    rows = poison(cache, config).layers
    spared = sum(int(np.isfinite(leaf).sum()) for leaf in jax.tree.leaves(rows))
    assert caches.live_nbytes(config, length, head) == 4 * spared


def test_an_empty_cache_has_the_documented_shapes():
    config, slack = models.micro_config(), 11
    cache = caches.empty(config, 50, batch=3, slack=slack)
    dense, csa, hca = cache.layers
    shape = lambda state: jax.tree.map(jnp.shape, (state.inputs, state.rows))  # noqa: E731
    assert [layer.raw.shape for layer in cache.layers] == [(3, 16 + slack, 32)] * 3
    assert shape(csa.compressor) == ((3, 8 + slack, 2, 64), (3, 12, 32))
    assert shape(csa.indexer) == ((3, 8 + slack, 2, 32), (3, 12, 16))
    assert shape(hca.compressor) == ((3, 16 + slack, 2, 32), (3, 3, 32))
    assert dense.compressor is dense.indexer is hca.indexer is None
    same(cache.length, [0, 0, 0])
    for leaf in jax.tree.leaves(cache.layers):
        assert leaf.dtype == jnp.float32 and not leaf.any()


def test_what_cannot_be_held_is_told_in_one_line():
    config = models.micro_config()
    for context in (0, -3):
        message = f"^max_context: expected at least 1, found {context}$"
        with pytest.raises(CapacityError, match=message):
            caches.empty(config, context)
    for slack in (7, 0, -1):
        with pytest.raises(ConfigError, match=f"^slack: .* at least 8, found {slack}$"):
            caches.empty(config, 5, slack=slack)
    caches.empty(config, 1, slack=DECODE_ROWS)


CONFIG = models.micro_config()
START, RESIDUES = 45, 16
"""Where straight decoding begins, and how far it goes: every residue mod 4 and 16."""


def decode(state, tokens):
    """Return a pass of up to 8 tokens, trunk and MTP head; the last is only paired."""
    cache, head = state
    model, count = lively(CONFIG), np.array([len(tokens) - 1], np.int32)
    padded = np.zeros((1, DECODE_ROWS + 1), np.int32)
    padded[0, : len(tokens)] = tokens
    out = models.trunk(model, padded[:, :-1], cache, count)
    return out, mtp(model, padded[:, 1:], out.streams, head, count)


@functools.cache
def straight():
    """Return the tokens, and (state before, first row of the results) of each step."""
    model, tokens = lively(CONFIG), text(CONFIG, START + RESIDUES + 20)
    out = models.trunk(model, tokens[:, :START], fresh(CONFIG))
    head = mtp(model, tokens[:, 1 : START + 1], out.streams, fresh(CONFIG, mtp=True))
    states, steps = [(out.cache, head.cache)], []
    for n in range(START, START + RESIDUES):
        outs = decode(states[-1], tokens[0, n : n + 2])
        states.append(tuple(out.cache for out in outs))
        steps.append([first_row(out) for out in outs])
    return tokens[0], states, steps


def first_row(out):
    return jax.tree.map(lambda x: x[:, :1], out.replace(cache=None))


@pytest.mark.parametrize("residue", range(RESIDUES))
@pytest.mark.parametrize("wrong", [1, 4, DECODE_ROWS, models.SLACK])
def test_rollback_then_redo_is_straight_decoding(residue, wrong):
    """Tokens that were taken back leave nothing that a later row could see."""
    tokens, states, steps = straight()
    state = states[residue]
    for some in np.split((tokens[:wrong] + 1) % CONFIG.vocab, [DECODE_ROWS]):
        if len(some):
            outs = decode(state, [*some, 5])
            state = [out.cache for out in outs]
    back = [cache.replace(length=cache.length - wrong) for cache in state]
    for found, expected in zip(back, states[residue], strict=True):
        assert_same_state(found, expected, CONFIG)
    n = START + residue
    redone = decode(back, tokens[n : n + 2])
    assert_same([first_row(out) for out in redone], steps[residue])
    for found, expected in zip(redone, states[residue + 1], strict=True):
        assert_same_state(found.cache, expected, CONFIG)


@pytest.mark.parametrize("residue", range(RESIDUES))
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_garbage_in_invisible_slots_changes_no_bit(residue, value):
    tokens, states, _ = straight()
    n = START + residue
    following = tokens[n : n + DECODE_ROWS + 1]
    expected = decode(states[residue], following)
    poisoned = [poison(cache, CONFIG, value) for cache in states[residue]]
    found = decode(poisoned, following)
    assert_same(*[[o.replace(cache=None) for o in outs] for outs in (found, expected)])
    for one, other in zip(found, expected, strict=True):
        assert_same_state(one.cache, other.cache, CONFIG)


@pytest.mark.parametrize("residue", [0, 3, 7, 14])
def test_garbage_in_invisible_slots_changes_no_bit_of_a_prefill_pass(residue):
    tokens, states, _ = straight()
    following = tokens[None, START + residue :][:, :20]
    cache = states[residue][0]
    expected = models.trunk(lively(CONFIG), following, cache)
    found = models.trunk(lively(CONFIG), following, poison(cache, CONFIG))
    assert_same(found.replace(cache=None), expected.replace(cache=None))
    assert_same_state(found.cache, expected.cache, CONFIG)
    assert np.isfinite(found.logits).all()
