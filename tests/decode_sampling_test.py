"""Sampling: the same text in every mode, and of the right distribution.

Numbers in docstrings are those of SPECULATION §7.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import replay
from replay import CONTEXT

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode

CONFIG = models.slim_config()
TEMPERATURE = 0.8
PLAIN = dataclasses.replace(GREEDY, temperature=TEMPERATURE)
SEEDS = 512
"""Sequences of a batch that differ in their noise alone."""
SIGMAS = 5
"""How far chi-square may lie above its mean, in deviations of its own: for right
probabilities 5 happens once in some 10^5 batches, and 20% more of the likeliest token
than there should be is 10 or more."""


@pytest.fixture(scope="module")
def model():
    return replay.guessing_model(CONFIG)


@pytest.fixture(scope="module")
def begun(model):
    """Return a carry that has read a prompt; its seed does not matter so far."""
    prompt = np.random.default_rng(3).integers(CONFIG.vocab, size=21).tolist()
    return driver.start(model, prompt, CONTEXT - len(prompt))


same_text = functools.partial(replay.assert_same_text, config=CONFIG)


def seeded(carry: DecodeCarry, seed: int, budget: int = 100) -> DecodeCarry:
    """Return a copy with the noise that `driver.start` gives a seed."""
    rng = carries.create(CONFIG, 1, mtp=False, seed=seed).rng
    carry = carries.with_budget(replay.copy(carry), budget)
    return dataclasses.replace(carry, rng=rng)


@pytest.fixture(scope="module")
def plains(model, begun):
    """Return what plain decoding samples with each of three seeds."""
    return [driver.run(model, seeded(begun, seed), PLAIN) for seed in range(3)]


@pytest.mark.parametrize(
    "mode",
    [Mode("chained", 3), Mode("continuous", 1), Mode("continuous", 4)],
    ids=str,
)
def test_every_mode_samples_plains_text(model, begun, plains, mode):
    """Property 37: tokens, logits and trunk state, bit for bit; drafts among them.

    Seen red with noise drawn at the row of the pass instead of the position.
    """
    how = Decoding(mode=mode, temperature=TEMPERATURE)
    accepted = 0
    for seed, plain in enumerate(plains):
        carry = driver.run(model, seeded(begun, seed), how)
        same_text(carry, plain)
        accepted += carry.statistics.of()["accepted"]
    assert accepted > 9


def test_a_seed_decides_the_text(model, begun, plains):
    """Property 37: the same text again, another one with another seed, or none."""
    again = driver.run(model, seeded(begun, 1), PLAIN)
    same_text(again, plains[1])
    texts = {tuple(driver.committed(plain)) for plain in plains}
    greedy = driver.run(model, seeded(begun, 1), GREEDY)
    assert len(texts | {tuple(driver.committed(greedy))}) == 4


def test_the_seed_of_start_is_that_noise(model, begun, plains):
    prompt = driver.committed(begun)
    carry = driver.start(model, prompt, 100, CONTINUOUS, seed=2)
    same_text(driver.run(model, carry, PLAIN), plains[2])


def test_the_noise_of_no_position_is_that_of_another():
    """Two equal tokens' logits, at 64 positions of 64 seeds: neither has to win."""
    keys = jax.random.split(jax.random.key(0), 64)
    at = jnp.broadcast_to(jnp.arange(64), (64, 64))
    chosen = transitions.choose(jnp.zeros((64, 64, 2)), at, keys, 1.0)
    rows = np.asarray(chosen)
    assert len(np.unique(rows, axis=0)) == len(np.unique(rows, axis=1).T) == 64
    # 64^2 fair coins: a deviation is 32.
    assert abs(int(rows.sum()) - 2048) < SIGMAS * 32


def chi_square(tokens, logits) -> float:
    """Return by how many deviations chi-square exceeds its mean.

    Tokens too rare to be expected 5 times count as one, as the test asks for.
    """
    expected = len(tokens) * np.asarray(jax.nn.softmax(logits / TEMPERATURE), float)
    found = np.bincount(tokens, minlength=len(expected)).astype(float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        found = np.append(found[~rare], found[rare].sum())
    free = len(expected) - 1
    assert free >= 5
    return (np.sum((found - expected) ** 2 / expected) - free) / np.sqrt(2 * free)


def test_choose_draws_from_the_softmax(begun):
    """Property 37: 100 000 draws, each of a key and a position of its own."""
    logits = begun.logits[0]
    count = 100_000
    keys = jax.random.split(jax.random.key(1), count)
    draw = jax.vmap(
        lambda key, at: transitions.choose(
            logits[None, None], at[None, None], key[None], TEMPERATURE
        )[0, 0]
    )
    tokens = np.asarray(draw(keys, jnp.arange(count) % CONTEXT))
    assert chi_square(tokens, logits) < SIGMAS
    # What it must not take for right: another temperature, or a token too many.
    assert chi_square(tokens, logits * 0.95) > SIGMAS
    worse = np.where(np.arange(count) < count // 50, logits.argmax(), tokens)
    assert chi_square(worse, logits) > SIGMAS


def test_what_is_committed_is_distributed_so(model, begun):
    """Property 37, end to end: the first and the second token of continuous decoding.

    The second follows a fixed first one.  It is committed as an accepted draft where
    the draft is right, else by the next pass: together they must be the trunk's own
    distribution, for which nothing may depend on the draft.
    """
    batch = carries.concatenate([begun] * SEEDS)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(SEEDS))
    how = dataclasses.replace(CONTINUOUS, temperature=TEMPERATURE)
    batch = carries.with_budget(dataclasses.replace(batch, rng=keys), 2)
    # A likely first token, as if all seeds had chosen it: its logits lead by far.
    first = int(begun.logits[0].argmax())
    forced = batch.logits.at[:, first].add(1e4)
    done = driver.run(model, dataclasses.replace(batch, logits=forced), how)
    length = int(begun.length[0])
    tokens = np.asarray(done.tokens)[:, length : length + 2]
    assert (tokens[:, 0] == first).all()
    accepted = int(done.statistics.accepted.sum())
    assert 0 < accepted < SEEDS
    after = replay.decode(model, begun, np.array([first], np.int32), CONTINUOUS)
    assert chi_square(tokens[:, 1], after.logits[0]) < SIGMAS
