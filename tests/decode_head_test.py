"""The MTP head's cache: a row for every committed token, and for nothing else.

What else its ring and those of the trunk hold, nothing sees.

Numbers in docstrings are those of SPECULATION §7.
"""

import dataclasses
import functools

import jax
import models
import numpy as np
import pytest
import replay
from replay import CONFIG, Replay, anchor, start, text

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, payload, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode

PARITY = dataclasses.replace(CONTINUOUS, policy="parity")
DEEP, CHAINED = (Decoding(mode=Mode(kind, 4)) for kind in ("continuous", "chained"))
WITH_GAPS = Decoding(mode=Mode("continuous", 2), fill=False)
SLIM = models.slim_config()
"""For which rows there are, whatever the layers are that made their streams."""
_draft = jax.jit(transitions.draft, static_argnames="depth")


@pytest.fixture(scope="module")
def model():
    return replay.guessing_model()


@pytest.mark.parametrize("budget", [1, 6])
def test_a_dropped_anchor_leaves_no_row_for_another_token(budget):
    """A row that waits may be in the head's ring already, made for the likely token.

    If the anchor is dropped and another token follows, no tag may vouch for it.  Seen
    red: a chained cycle whose budget ends in its base pass leaves such a row.
    """
    model = replay.guessing_model(SLIM)
    how = dataclasses.replace(PARITY, mode=Mode("chained", 4))
    carry = driver.run(
        model, carries.with_budget(start(model, text(37), PARITY), budget), how
    )
    tokens = driver.committed(carry)
    carry, _ = driver.sync(model, carry, tokens, PARITY)
    again = Replay(model)
    again.prefill(tokens[:37])
    for token in tokens[37:]:
        again.decode(token)
    other = (again.best() + 1) % CONFIG.vocab
    again.decode(other)
    carry = replay.decode(model, carry, np.array([other]), PARITY)
    replay.assert_head_rows(carry, again.state, gaps=True)


@pytest.mark.parametrize(
    "depth, config", [(1, CONFIG), (2, SLIM), (3, SLIM), (4, CONFIG)]
)
def test_every_committed_token_gets_its_head_row(depth, config):
    """The head's rows are plain decoding's, whatever was drafted before.

    Also those of the prompt, and whichever rows wait in the anchor meanwhile.  Seen
    red with rows made from the head's own streams left in the cache.
    """
    model, how = replay.guessing_model(config), Decoding(mode=Mode("continuous", depth))
    tokens = text(9)
    plain, carry = Replay(model), start(model, tokens)
    plain.prefill(tokens)
    seen = set()
    for _ in range(30):
        carry = driver.run(model, carry, how, limit=1)
        for token in driver.committed(carry)[len(plain.tokens) :]:
            plain.decode(token)
        seen.add(int(anchor(carry).rows[0]))
        replay.assert_head_rows(carry, plain.state)
    assert len(seen) > 1


def test_without_fill_the_head_has_gaps_and_the_tokens_are_plains(model):
    """Only rows that a draft started from are there; tags tell, and they are true."""
    how, tokens = WITH_GAPS, text(9)
    plain, carry = Replay(model), start(model, tokens, how)
    plain.prefill(tokens)
    ends = []
    while len(plain.tokens) < 50:
        ends.append(len(plain.tokens))
        carry = driver.run(model, carry, how, limit=1)
        for token in driver.committed(carry)[len(plain.tokens) :]:
            plain.decode(token)
    replay.assert_same_text(carry, plain.state)
    replay.assert_head_rows(carry, plain.state, gaps=True)
    expected = {end - 1 for end in ends}
    assert carry.mtp_cache is not None
    size = carry.mtp_cache.layers[0].raw.shape[1]
    assert replay.head_rows(carry).keys() == {
        t for t in expected if t >= ends[-1] - size
    }
    assert len(expected) < ends[-1] - ends[0]


@functools.cache
def _rejected(how: Decoding, least: int, tokens: int = 9) -> DecodeCarry:
    model = replay.guessing_model()
    carry = start(model, text(tokens), how)
    while carry.length[0] < least or carry.reach[0] < carry.length[0] + how.depth:
        assert carry.active[0]
        carry = driver.run(model, carry, how, limit=1)
    assert carry.statistics.accepted.any()
    return carry


def rejected(how: Decoding, least: int) -> DecodeCarry:
    """Return the first carry of so many tokens whose last cycle kept no draft."""
    return replay.copy(_rejected(how, least))


def go_on(model, carry, how, budget: int = 20) -> DecodeCarry:
    """Return `carry`, which stays, moved on over the end of a row of either ratio."""
    carry = replay.copy(carries.with_budget(carry, budget))
    return driver.run(model, carry, how)


def rewound(model, back: int) -> DecodeCarry:
    carry = rejected(DEEP, 97)
    return driver.rewind(model, carry, int(carry.length[0]) - back)


def synced(model, back: int, how: Decoding, expected: str) -> DecodeCarry:
    """Return a carry with other tokens instead of the last, or with three more."""
    carry = rejected(DEEP, 97)
    tokens = driver.committed(carry)
    prompt = tokens[: len(tokens) - back] + [1, 2, 3] * (how.policy == "warm")
    carry, done = driver.sync(model, carry, prompt, how)
    assert done == expected
    return carry


STATES = {
    "a token read": lambda model: start(model, text(1)),
    "a window read": lambda model: start(model, text(16)),
    "a ring read": lambda model: start(model, text(48)),
    "17": lambda _: rejected(DEEP, 17),
    "41": lambda _: rejected(DEEP, 41),
    "49": lambda _: rejected(DEEP, 49),
    "97": lambda _: rejected(DEEP, 97),
    "chained": lambda _: rejected(CHAINED, 60),
    "rows that wait": lambda model: go_on(model, rejected(CHAINED, 60), CHAINED, 1),
    "gaps": lambda _: rejected(WITH_GAPS, 60),
    "plain": lambda model: go_on(model, rejected(DEEP, 41), GREEDY),
    "rewound by nothing": lambda model: rewound(model, 0),
    "rewound": lambda model: rewound(model, 27),
    "no anchor": lambda model: synced(model, 0, PARITY, "kept"),
    "extended": lambda model: synced(model, 0, CONTINUOUS, "extended"),
    "synced": lambda model: synced(model, 20, CONTINUOUS, "rewound"),
    "rebuilt": lambda model: synced(model, 60, CONTINUOUS, "rebuilt"),
}


def assert_same_visible(actual: DecodeCarry, expected: DecodeCarry):
    """Compare all but what nothing sees: counters and tags too, bit for bit."""

    def seen(carry):
        carry = replay.poisoned(carry)
        return dataclasses.replace(carry, rng=jax.random.key_data(carry.rng))

    models.assert_same(seen(actual), seen(expected))


@pytest.mark.parametrize("state", STATES)
def test_garbage_changes_nothing(model, state):
    """Property 33: not a token, not a counter, and nothing that is seen later on.

    Seen red with `blank_invisible` that returns rows as they are, with `extend_tags`
    that believes every tag, and with an anchor that is valid without rows.
    """
    clean = STATES[state](model)
    garbage = replay.poisoned(clean)
    for how in (GREEDY, CONTINUOUS, DEEP, CHAINED):
        expected = go_on(model, clean, how)
        assert_same_visible(go_on(model, garbage, how), expected)
        assert np.isfinite(expected.logits).all()


@pytest.mark.parametrize("state", ["17", "41", "97", "rows that wait", "no anchor"])
def test_garbage_out_of_reach_leaves_a_rewind_exact(model, state):
    """Property 33: what a rewind may look at is kept, all else is garbage."""
    clean = STATES[state](model)
    least, end = driver.rewind_limit(clean), int(clean.length[0])
    garbage = replay.poisoned(clean, least)
    for length in {least, least + 1, (least + end) // 2, end - 1, end}:
        pair = [driver.rewind(model, replay.copy(c), length) for c in (garbage, clean)]
        assert_same_visible(*pair)
        assert_same_visible(*(go_on(model, carry, DEEP) for carry in pair))


def test_garbage_may_be_saved(model, tmp_path):
    """Property 33: a restored carry has the garbage of the rings, unseen, or other."""
    clean = rejected(DEEP, 49)
    payload.save(tmp_path / "session", model, replay.poisoned(clean))
    restored = payload.restore(tmp_path / "session", model, decoding=DEEP)
    for carry in (restored, replay.poisoned(restored)):
        assert_same_visible(go_on(model, carry, DEEP), go_on(model, clean, DEEP))


def spoilt(carry: DecodeCarry, name: str, index: int, value=np.nan) -> DecodeCarry:
    """Return `carry` with `value` at an index of the first sequence of a leaf."""
    found = []

    def spoil(path, leaf):
        if jax.tree_util.keystr(path) != name:
            return leaf
        found.append(name)
        return leaf.at[0, index].set(value)

    carry = jax.tree_util.tree_map_with_path(spoil, carry)
    assert found == [name]
    return carry


VISIBLE = [
    (".cache.layers[0].raw", 45),
    (".cache.layers[1].raw", 45),
    (".cache.layers[2].raw", 45),
    (".cache.layers[1].compressor.inputs", 56 % 40),
    (".cache.layers[1].compressor.rows", 0),
    (".cache.layers[1].compressor.rows", 14),
    (".cache.layers[1].indexer.inputs", 56 % 40),
    (".cache.layers[1].indexer.rows", 0),
    (".cache.layers[1].indexer.rows", 14),
    (".cache.layers[2].compressor.inputs", 48 % 48),
    (".cache.layers[2].compressor.rows", 0),
    (".cache.layers[2].compressor.rows", 2),
]
"""The oldest and the newest of each kind that is seen after 60 tokens."""


@pytest.mark.parametrize("name, index", VISIBLE)
def test_garbage_where_it_is_seen_is_noticed(model, name, index):
    """Planted: the row that is nearest to what `poisoned` fills with garbage."""
    clean = start(model, text(60))
    expected = go_on(model, clean, GREEDY)
    found = go_on(model, spoilt(clean, name, index), GREEDY)
    assert (found.logits != expected.logits).any()


@pytest.mark.parametrize(
    "name, index, value",
    [
        (".mtp_cache.layers[0].raw", 44, np.nan),
        (".mtp_cache.layers[0].raw", 58 % 48, np.nan),
        (".mtp_cache.layers[0].tags", 44, -1),
        (".mtp_cache.layers[0].tags", 58 % 48, 58 - 48),
        (".anchor.streams", 0, np.nan),
    ],
)
def test_garbage_where_the_head_sees_it_is_noticed(model, name, index, value):
    """Planted: by how much a guess leads says so, even where all guesses are wrong."""
    clean = start(model, text(60))
    first = transitions.first_token(clean)
    leads = [
        _draft(model, carry, first, 1)[2]
        for carry in (clean, replay.poisoned(clean), spoilt(clean, name, index, value))
    ]
    assert leads[0] == leads[1] != leads[2]
