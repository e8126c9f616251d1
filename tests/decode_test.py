import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.errors import CapacityError, ConfigError, TokenError


@pytest.fixture(scope="module")
def model():
    return models.lively(models.micro_config())


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(0, 96, 37).tolist()


@pytest.fixture(scope="module")
def plain(model, prompt):
    return driver.run(model, driver.start(model, prompt, 60, 0), 0)


def test_plain_decoding_is_the_models_own_argmax(model, prompt, plain):
    # Teacher forcing is a prefill pass, another numeric class: float noise of 1e-5
    # against top-two gaps of 1e-3 and more leaves the argmax alone.
    tokens = driver.committed(plain)
    logits = jax.jit(lambda m, t: m.modules().trunk(t).logits)(
        model, np.array([tokens])
    )
    chosen = np.asarray(logits[0]).argmax(-1)
    assert chosen[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]


@pytest.mark.parametrize("depth", [1, 2])
def test_continuous_commits_plains_tokens_and_bits(model, prompt, plain, depth):
    carry = driver.run(model, driver.start(model, prompt, 60, depth), depth)
    assert driver.committed(carry) == driver.committed(plain)
    np.testing.assert_array_equal(carry.logits, plain.logits)
    counts = carry.statistics.of()
    assert counts["committed"] == 60 == counts["passes"] + counts["accepted"]
    assert counts["drafted"] == depth * counts["passes"]


def test_streaming_gives_the_same_tokens(model, prompt, plain):
    carry = driver.start(model, prompt, 60, 1)
    pieces = [new for _, new in driver.stream(model, carry, 1, every=7)]
    assert len(pieces) > 1
    assert sum(pieces, []) == driver.committed(plain)[len(prompt) :]


@pytest.mark.parametrize("depth", [0, 1])
def test_an_end_token_ends_the_sequence_and_is_committed(model, prompt, plain, depth):
    tokens = driver.committed(plain)[len(prompt) :]
    eos = tokens[25]
    carry = driver.run(model, driver.start(model, prompt, 60, depth), depth, eos)
    assert driver.committed(carry)[len(prompt) :] == tokens[: tokens.index(eos) + 1]
    assert bool(carry.done[0])


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_a_budget_is_spent_exactly(model, prompt, plain, budget):
    carry = driver.run(model, driver.start(model, prompt, budget, 1), 1)
    expected = driver.committed(plain)[: len(prompt) + budget]
    assert driver.committed(carry) == expected


def test_right_drafts_halve_the_passes(model, prompt, plain, monkeypatch):
    def oracle(model, carry, first, depth):
        at = (0, carry.length[0] + 1)
        return carry, jax.lax.dynamic_slice(plain.tokens, at, (1, depth))

    monkeypatch.setattr(transitions, "draft", oracle)
    step = jax.jit(
        lambda model, carry: transitions.cycle(model, carry, jnp.int32(-1), 1)
    )
    carry = driver.start(model, prompt, 60, 1)
    for _ in range(30):
        carry = step(model, carry)
    assert driver.committed(carry) == driver.committed(plain)
    counts = carry.statistics.of()
    assert counts["passes"] == counts["accepted"] == 30


def test_mistakes_are_told(model):
    with pytest.raises(TokenError, match="prompt: expected at least one token"):
        driver.start(model, [], 4, 0)
    with pytest.raises(TokenError, match=r"prompt: expected ids in 0\.\.95, found 96"):
        driver.start(model, [96], 4, 0)
    with pytest.raises(CapacityError, match="max_tokens: expected at least 0"):
        driver.start(model, [1], -1, 0)
    with pytest.raises(ConfigError, match=r"depth: expected 0\.\.4, found 5"):
        carries.create(model.config, 64, depth=5, mtp=True)
    headless = dataclasses.replace(model, mtp={})
    with pytest.raises(ConfigError, match="expected 0 without an MTP head, found 1"):
        driver.start(headless, [1], 4, 1)
