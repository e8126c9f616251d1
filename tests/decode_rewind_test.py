"""Taking tokens back, and making another text of those that are there.

Numbers in docstrings are those of SPECULATION §7.  A rewind is followed by a token that
the text did not have, so that what was there before is wrong wherever it is left.
"""

import dataclasses
import functools

import jax
import models
import numpy as np
import pytest
import replay
from replay import CONFIG, CONTEXT, Replay, anchor, start, text

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, Decoding, Mode
from ds4jax.errors import CapacityError
from ds4jax.model.cache import DEFAULT_SLACK

WARM, PARITY = CONTINUOUS, dataclasses.replace(CONTINUOUS, policy="parity")
POLICIES = {"warm": WARM, "parity": PARITY}
every_policy = pytest.mark.parametrize("how", POLICIES.values(), ids=POLICIES.keys())
DEEP = Mode("continuous", 4)
MORE = 9
"""Tokens to go on for, enough for a row of the ratio of 4 and some drafts kept."""


@pytest.fixture(scope="module")
def model():
    return replay.guessing_model()


def go_on(model, carry: DecodeCarry, how: Decoding, budget: int = MORE) -> DecodeCarry:
    """Return `carry`, which stays, moved on with four drafts a cycle."""
    carry = replay.copy(carries.with_budget(carry, budget))
    return driver.run(model, carry, dataclasses.replace(how, mode=DEEP))


def decode(model, carry: DecodeCarry, token: int, how: Decoding) -> DecodeCarry:
    return replay.decode(model, carry, np.array([token], np.int32), how)


def least(carry: DecodeCarry) -> int:
    """Return the shortest length that the rings' slack keeps in reach."""
    return int(carry.reach[0]) - DEFAULT_SLACK


@dataclasses.dataclass
class Decoded:
    """A text that was read and gone on with, and its replay.

    Attributes:
      carries: by policy, after drafts of which the last cycle rejected some.
      plain: the replay, its prompt in one pass, then a token a pass.
    """

    carries: dict[str, DecodeCarry]
    plain: Replay

    @property
    def tokens(self) -> list[int]:
        return self.plain.tokens

    def carry(self, how: Decoding) -> DecodeCarry:
        return replay.copy(self.carries[how.policy])

    def other(self, length: int) -> int:
        """Return a token that does not follow the first `length`."""
        following = [*self.tokens, self.plain.best()][length]
        return (following + 1) % CONFIG.vocab

    def at(self, length: int) -> DecodeCarry:
        """Return the replay's state after as many tokens, not all of the prompt's."""
        prompt = len(self.plain.steps[0][0])
        return self.plain.states[1 + length - prompt]


@functools.cache
def decoded(prompt: int, end: int) -> Decoded:
    """Return a text whose last drafts reach just beyond `end`.

    The last cycle is at depth 4 and rejects three drafts or more.
    """
    model, plain = replay.guessing_model(), Replay(replay.guessing_model())
    tokens, found = text(prompt), {}
    for policy, how in POLICIES.items():
        carry = start(model, tokens, how)
        deep = dataclasses.replace(how, mode=DEEP)
        while carry.length[0] < end - 3 or carry.reach[0] < carry.length[0] + 3:
            assert carry.active[0]
            carry = driver.run(model, carry, deep, limit=1)
        found[policy] = carry
    assert int(found["warm"].statistics.accepted.sum()) > 0
    plain.prefill(tokens)
    for token in driver.committed(found["warm"])[prompt:]:
        plain.decode(token)
    return Decoded(found, plain)


TEXTS = {"first lap": (5, 44), "later lap": (37, 108)}
every_text = pytest.mark.parametrize("where", TEXTS.values(), ids=TEXTS.keys())


def newest(carry: DecodeCarry) -> dict:
    """Return the anchor proper."""
    kept = anchor(carry)
    streams = np.asarray(kept.streams)[0, int(kept.rows[0]) - 1]
    return {"streams": streams, "position": kept.position}


def assert_same_now(carry: DecodeCarry, expected: DecodeCarry, how):
    """Compare with a state of the policy warm."""
    replay.assert_same_text(carry, expected)
    replay.assert_head_rows(carry, expected, gaps=how.policy == "parity")
    if how.policy == "warm":
        models.assert_same(newest(carry), newest(expected))


def assert_same_later(model, carry, expected, how, token: int | None = None):
    """Compare what follows, `token` first if there is one."""
    if token is not None:
        carry = decode(model, carry, token, how)
        expected = decode(model, expected, token, WARM)
    carry, expected = go_on(model, carry, how), go_on(model, expected, WARM)
    assert_same_now(carry, expected, how)
    if how.policy == "warm":
        models.assert_same(carry.statistics, expected.statistics)
    else:
        assert carry.statistics.of()["boots"] == 1


@every_text
@every_policy
def test_a_rewind_is_the_replay_of_the_prefix(model, how, where):
    """Property 28: of every length in reach, bit for bit; and so is what follows.

    Rows of the ratios of 4 and 16 end on the way, and on the later lap each ring comes
    round.  Drafts are as often right as the replay's.
    """
    text = decoded(*where)
    end = len(text.tokens)
    shortest = least(text.carry(how))
    assert shortest > where[0] and end - shortest > 28
    for length in range(shortest, end + 1):
        carry = driver.rewind(model, text.carry(how), length, how)
        assert_same_now(carry, text.at(length), how)
        assert_same_later(model, carry, text.at(length), how, text.other(length))


@every_text
@every_policy
def test_beyond_reach_it_says_so_and_nothing_is_done(model, how, where):
    """Property 28: one line that names what is in reach; the carry stays as it was."""
    text = decoded(*where)
    carry = text.carry(how)
    before, end = replay.copy(carry), len(text.tokens)
    shortest = least(carry)
    for length in (shortest - 1, 0, -1, end + 1):
        told = f"^rewind: expected a length in {shortest}..{end}, found {length}; sync"
        with pytest.raises(CapacityError, match=told):
            driver.rewind(model, carry, length, how)
    assert_same_carry(carry, before)
    carry = driver.rewind(model, carry, shortest, how)
    assert_same_now(carry, text.at(shortest), how)
    assert_same_later(model, carry, text.at(shortest), how, text.other(shortest))


def assert_same_carry(actual: DecodeCarry, expected: DecodeCarry):
    """Compare all there is, visible or not."""
    plain = lambda x: dataclasses.replace(x, rng=jax.random.key_data(x.rng))  # noqa: E731
    models.assert_same(plain(actual), plain(expected))


def test_a_limit_one_too_generous_is_noticed(model, monkeypatch):
    """Planted: the oldest row that is seen was overwritten by a rejected one."""
    where = TEXTS["later lap"]
    text = decoded(*where)
    carry = text.carry(WARM)
    beyond = least(carry) - 1
    monkeypatch.setattr(driver, "rewind_limit", lambda carry: beyond)
    carry = driver.rewind(model, carry, beyond, WARM)
    with pytest.raises(AssertionError, match="not equal"):
        assert_same_now(carry, text.at(beyond), WARM)


def test_head_rows_that_are_not_forgotten_are_noticed(model, monkeypatch):
    """Planted: a rewind that leaves the tags of what it takes back.

    Where a policy drops the anchor, no row is written for the token that comes next,
    and the old one, of another token, would do for it.
    """
    where = TEXTS["later lap"]
    text = decoded(*where)
    length = len(text.tokens) - 9
    unforgetful = jax.jit(
        lambda model, carry, length, decoding: transitions.rewind(
            model, carry, length, decoding
        ),
        static_argnames="decoding",
    )
    with monkeypatch.context() as patch:
        patch.setattr(transitions, "forget", lambda cache, length: cache)
        patch.setattr(driver, "_rewind", unforgetful)
        carry = driver.rewind(model, text.carry(PARITY), length, PARITY)
    assert_same_now(carry, text.at(length), PARITY)
    with pytest.raises(AssertionError, match="not equal"):
        assert_same_later(model, carry, text.at(length), PARITY, text.other(length))


@every_text
@every_policy
def test_rewinding_again_reaches_no_further_than_at_first(model, how, where):
    """Property 28: what overwrote the rows beyond does not go away by a rewind.

    Once from the same text, and once after another token that fewer rows follow.  Seen
    red with a rewind that sets `reach` to the length.
    """
    text = decoded(*where)
    shortest, end = least(text.carry(how)), len(text.tokens)
    carry = driver.rewind(model, text.carry(how), end - 7, how)
    assert driver.rewind_limit(carry) == shortest
    other = decode(model, replay.copy(carry), text.other(end - 7), how)
    for again in (carry, go_on(model, other, how, budget=1)):
        assert driver.rewind_limit(again) == shortest
        for length in (shortest + 6, shortest, shortest):
            again = driver.rewind(model, again, length, how)
            assert_same_now(again, text.at(length), how)
        assert_same_later(model, again, text.at(length), how, text.other(length))
        with pytest.raises(CapacityError, match=f"in {shortest}..{shortest}, found"):
            driver.rewind(model, again, shortest - 1, how)


@every_policy
def test_a_rewind_into_the_prompt(model, how):
    """Property 28: of a text that was read, then gone on with for a few tokens."""
    prompt = text(37)
    carry = go_on(model, start(model, prompt, how), how, budget=4)
    for length in range(least(carry), 38):
        plain = Replay(model)
        plain.prefill(prompt)
        plain.rewind(length)
        again = driver.rewind(model, replay.copy(carry), length, how)
        assert_same_now(again, plain.state, how)


@every_policy
def test_a_stop_within_a_block_keeps_the_text(model, how):
    """Property 35: a stop after the first of two tokens; what follows extends it.

    The replay never had the second token.  Seen red with a rewind to a token less.
    """
    prompt = text(37)
    carry = start(model, prompt, how)
    before = int(carry.length[0])
    while carry.length[0] < before + 2:
        before = int(carry.length[0])
        carry = driver.run(model, carry, how, limit=1)
    tokens = driver.committed(carry)[:-1]
    carry = driver.rewind(model, carry, before + 1, how)
    carry, done = driver.sync(model, carry, [*tokens, 5, 6, 7], how)
    assert done == "extended" and carry.length[0] == before + 4
    plain = Replay(model)
    plain.prefill(prompt)
    for token in tokens[37:]:
        plain.decode(token)
    plain.prefill([5, 6, 7])
    assert_same_now(carry, plain.state, how)
    assert_same_later(model, carry, plain.state, how)


near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def assert_seams(carry: DecodeCarry, cold: DecodeCarry, how, seams, others):
    """Compare the head's rows, of which those at `seams` were left to the next sync."""
    found, wanted = replay.head_rows(carry), replay.head_rows(cold)
    for position, row in wanted.items():
        if position not in seams:
            others(found[position], row)
        elif how.policy == "warm":
            near(found[position], row)
        else:
            assert position not in found


@every_policy
@pytest.mark.parametrize("cut", [1, 9, 60, 99])
def test_an_extended_text_is_nearly_a_cold_one(model, how, cut):
    """Property 27: the rows are the same, but stand elsewhere in what a pass sums up.

    A sum in another order differs in its last bits, here by up to 2e-6 for values of
    up to 4; the model does not round what it caches, which could make more of it.
    """
    prompt = text(100)
    carry, done = driver.sync(model, start(model, prompt[:cut], how), prompt, how)
    assert done == "extended" and driver.committed(carry) == prompt
    cold = start(model, prompt, how)
    jax.tree.map(near, *(models.poison(c.cache, CONFIG) for c in (carry, cold)))
    near(carry.logits, cold.logits)
    near(anchor(carry).streams[:, 0], anchor(cold).streams[:, 0])
    assert_seams(carry, cold, how, [cut - 1], others=near)


@every_policy
def test_a_text_extended_chunk_by_chunk_is_the_cold_one(model, how):
    """Property 27: passes over the same rows give the same bits.

    Not in the head's rows at the seams, which a pass of their own writes.
    """
    how = dataclasses.replace(how, prefill_chunk=20)
    prompt, carry = text(100), replay.empty()
    for end in (20, 60, 80, 100):
        carry, done = driver.sync(model, carry, prompt[:end], how)
        assert done == ("rebuilt" if end == 20 else "extended")
    cold = start(model, prompt, how)
    replay.assert_same_text(carry, cold)
    models.assert_same(anchor(carry), anchor(cold))
    same = np.testing.assert_array_equal
    assert_seams(carry, cold, how, [59, 79], others=same)


SYNCED = {
    "exactly in reach": ("later lap", 0, 3, "rewound"),
    "one beyond": ("later lap", -1, 3, "rebuilt"),
    "well in reach": ("later lap", 13, 3, "rewound"),
    "far beyond": ("first lap", -9, 3, "rebuilt"),
    "shorter, exactly in reach": ("later lap", 0, 0, "rewound"),
    "shorter, one beyond": ("later lap", -1, 0, "rebuilt"),
    "shorter by one": ("later lap", None, 0, "rewound"),
}


@pytest.mark.parametrize("where, beyond, more, expected", SYNCED.values(), ids=SYNCED)
@every_policy
def test_sync_keeps_what_is_in_reach(model, how, where, beyond, more, expected):
    """Property 27: rewound, the replay's state; rebuilt, a fresh start's; both exact.

    Seen red with a `sync` that rewinds to one token less than is the same, with a limit
    one too generous, and with an `invalidate` that leaves the tags of the head's rows.
    """
    old = decoded(*TEXTS[where])
    carry, shortest = old.carry(how), least(old.carry(how))
    same = len(old.tokens) - 1 if beyond is None else shortest + beyond
    new = [old.other(same), *text(more - 1, seed=1)] if more else []
    prompt = [*old.tokens[:same], *new]
    carry, done = driver.sync(model, carry, prompt, how)
    assert done == expected and driver.committed(carry) == prompt
    fresh = Replay(model)
    if done == "rewound":
        fresh.states, fresh.steps = [old.at(same)], [(prompt[:same], True)]
        if new:
            fresh.prefill(new)
        state = fresh.state
    else:
        state = start(model, prompt)
    assert_same_now(carry, state, how)
    assert_same_later(model, carry, state, how)


@every_policy
def test_a_text_that_is_there_is_kept(model, how):
    """Property 27: nothing is computed; of another first token nothing is kept."""
    old = decoded(*TEXTS["later lap"])
    carry, done = driver.sync(model, old.carry(how), old.tokens, how)
    assert done == "kept"
    assert_same_carry(
        dataclasses.replace(carry, anchor=None, mtp_cache=None),
        dataclasses.replace(old.carries[how.policy], anchor=None, mtp_cache=None),
    )
    assert bool(anchor(carry).valid[0]) == (how.policy == "warm")
    prompt = [old.other(0), *old.tokens[1:]]
    carry, done = driver.sync(model, carry, prompt, how)
    assert done == "rebuilt"
    fresh = start(model, prompt)
    assert_same_now(carry, fresh, how)
    assert_same_later(model, carry, fresh, how)


@every_policy
def test_sync_leaves_room_for_a_token_or_the_text_as_it_was(model, how):
    """Property 27: a prompt of the whole context is refused before anything is done."""
    old = decoded(*TEXTS["later lap"])
    carry, before = old.carry(how), old.carry(how)
    full = [*old.tokens, *text(CONTEXT - len(old.tokens))]
    for prompt in (full, full[::-1], [*full, 1]):
        told = f"^context: {len(prompt) + 1} tokens do not fit in {CONTEXT};"
        with pytest.raises(CapacityError, match=told):
            driver.sync(model, carry, prompt, how)
    assert_same_carry(carry, before)
    carry, done = driver.sync(model, carry, full[:-1], how)
    assert done == "extended"
    carry = go_on(model, carry, how, budget=2)
    assert driver.committed(carry)[:-1] == full[:-1]
    assert carry.length[0] == CONTEXT and carry.statistics.of()["committed"] == 1
