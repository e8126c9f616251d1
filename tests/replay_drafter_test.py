"""The replay drafter: right as often as it is told, and plain decoding's tokens.

What a run must count follows from the schedule alone, by the arithmetic of `expected`.
"""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax.decode import driver, transitions
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.modes import GREEDY, Decoding, Mode
from ds4jax.decode.replay_drafter import STRATA, Schedule, drafter, right
from ds4jax.experiments import context_sweep, pass_times
from ds4jax.experiments.context_sweep import Point, Way, sweep
from ds4jax.experiments.unread import unread

START, TOKENS, CONTEXT, SEED = 20, 60, 256, 3
RATES = [0.0, 0.3, 0.7, 1.0]
MODES = [Mode("continuous", 1), Mode("continuous", 3), Mode("chained", 2)]


def expected(way: Way) -> tuple[int, int, list[int], list[int]]:
    """Return the passes, base passes, drafts and accepted drafts of a run."""
    assert way.rate is not None
    told = right(way.rate, CONTEXT, SEED)
    depth, left = way.decoding.depth, TOKENS
    passes, decodes = 0, 0
    drafted, accepted = np.zeros((2, MAX_DEPTH), int)
    while left:
        if way.decoding.mode.kind == "chained":
            passes, decodes, left = passes + 1, decodes + 1, left - 1
            if not left:
                break
        guesses = told[drafted[0], :depth]
        kept = min(1 + int(np.cumprod(guesses).sum()), left)
        passes += 1
        drafted[: min(depth, left - 1)] += 1
        accepted[: kept - 1] += 1
        left -= kept
    return passes, decodes, drafted.tolist(), accepted.tolist()


@pytest.fixture(scope="module")
def model():
    return models.lively(models.slim_config())


def measured(model, modes, rates, read=True) -> list[Point]:
    prompt = models.text(model.config, START)[0].tolist()
    how = [Decoding(mode=mode) for mode in modes]
    ways = [Way(GREEDY), *(Way(one, rate) for one in how for rate in rates)]
    # The passes that are timed apart are programs of their own.
    with mock.patch.object(pass_times, "measure", lambda *_: (None, None)):
        return list(sweep(model, prompt, [START], TOKENS, ways, CONTEXT, SEED, read))


@pytest.fixture(scope="module")
def points(model):
    programs: Any = context_sweep._replay
    programs.clear_cache()
    found = measured(model, MODES, RATES)
    assert programs._cache_size() == len(MODES)  # each of every rate
    return found


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.kind}{mode.depth}")
def test_a_replay_counts_what_its_schedule_says(points, mode):
    plain, *replays = points
    assert len(set(plain.tokens)) > TOKENS // 4
    replays = [point for point in replays if point.way.decoding.mode == mode]
    assert [point.way.rate for point in replays] == RATES
    for point in replays:
        assert point.tokens == plain.tokens
        found = point.passes, point.decodes, point.drafted, point.accepted
        assert found == expected(point.way)
    shares = [sum(point.accepted) for point in replays]
    assert shares == sorted(set(shares))
    if mode.kind == "continuous":
        assert replays[0].passes == TOKENS
        assert replays[-1].passes == TOKENS // (1 + mode.depth)


def test_a_wrong_guess_is_the_heads_own(model):
    """Else XLA would leave the head out, and its time; and right by chance it errs."""
    carry = driver.start(model, [1, 2, 3], 9)
    first = transitions.first_token(carry)
    nowhere = jnp.zeros((9, MAX_DEPTH), bool)

    @jax.jit
    def guess(shift):
        own = transitions.draft(model, carry, first, 2)[1]
        text = carry.tokens.at[:, 4:6].set((own + shift) % model.config.vocab)
        draft = drafter(Schedule(text, nowhere))
        return own, draft(model, carry, first, 2, 0.0, "trained")[1]

    np.testing.assert_array_equal(*guess(7))
    own, found = guess(0)
    np.testing.assert_array_equal(found, (own + 1) % model.config.vocab)


def test_a_schedule_grows_with_the_rate_and_begins_alike_whatever_its_length():
    few, many = right(0.4, 1000, 5), right(0.4, 3000, 5)
    np.testing.assert_array_equal(few, many[:1000])
    assert not (few & ~right(0.6, 1000, 5)).any()
    assert right(1.0, 1000).all() and not right(0.0, 1000).any()
    assert (right(0.4, 1000, 6) != few).any()


def test_a_schedule_keeps_to_its_rate_in_every_stratum_and_places_err_apart():
    told = right(0.4, 150 * STRATA)
    blocks = told.reshape(-1, STRATA, MAX_DEPTH).sum(axis=1)
    assert (blocks == 0.4 * STRATA).all()
    orders = {tuple(block) for block in told[:, 0].reshape(-1, STRATA).tolist()}
    assert len(orders) > 100
    for place in range(1, MAX_DEPTH):
        both = told[:, 0] & told[:, place]
        # Five deviations of independent draws; strata make them fewer.
        assert abs(both.mean() - 0.16) < 5 * (0.16 * 0.84 / len(told)) ** 0.5
    uneven = right(0.33, 150 * STRATA).reshape(-1, STRATA, MAX_DEPTH).sum(axis=1)
    assert set(uneven.ravel().tolist()) == {6, 7}


def test_a_state_that_was_not_read_decodes_as_one_that_was(model):
    plain, replay = measured(model, MODES[:1], RATES[1:2], read=False)
    assert (plain.read, plain.context) == (0, START)
    assert replay.tokens == plain.tokens
    assert expected(replay.way) == (
        replay.passes, replay.decodes, replay.drafted, replay.accepted
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 5, 60])
def test_a_state_that_was_not_read_has_the_places_of_one_that_was(model, length):
    """Lengths, positions and which row each slot of the head's ring holds."""
    text = models.text(model.config, length)[0].tolist()
    was = driver.prefill(model, driver.create(model, CONTEXT), text)
    was = dataclasses.replace(was, rng=jax.random.key_data(was.rng))
    made = unread(driver.create(model, CONTEXT), length)
    made = dataclasses.replace(made, rng=jax.random.key_data(made.rng))
    assert jax.tree.structure(was) == jax.tree.structure(made)
    for path, leaf in jax.tree.leaves_with_path(was):
        name = jax.tree_util.keystr(path)
        twin = dict(jax.tree.leaves_with_path(made))[path]
        assert (leaf.shape, leaf.dtype) == (twin.shape, twin.dtype), name
        if jnp.issubdtype(leaf.dtype, jnp.floating) and name != ".gate.credit":
            assert 0.9 < float(twin.std()) < 1.1, name
        elif name != ".tokens" and not name.startswith(".mtp_cache.length"):
            np.testing.assert_array_equal(twin, leaf, name)
