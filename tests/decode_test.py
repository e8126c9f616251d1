import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.decode import carry as carries
from ds4jax.decode import cycles, driver
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode
from ds4jax.decode.precedence import Ds4Flags, resolve
from ds4jax.errors import ConfigError, TokenError
from ds4jax.model.mtp import MTPHead


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(0).integers(0, 96, 37).tolist()


@pytest.fixture(scope="module")
def plain(model, prompt):
    return driver.run(model, driver.start(model, prompt, 60, GREEDY), GREEDY)


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
    how = Decoding(mode=Mode("continuous", depth))
    carry = driver.run(model, driver.start(model, prompt, 60, how), how)
    assert driver.committed(carry) == driver.committed(plain)
    np.testing.assert_array_equal(carry.logits, plain.logits)
    counts = carry.statistics.of()
    assert counts["committed"] == 60 == counts["passes"] + counts["accepted"]
    # The last `depth` cycles of a budget have leave for fewer drafts.
    assert 0 <= depth * counts["passes"] - counts["drafted"] <= depth * (depth + 1) / 2


def test_streaming_gives_the_same_tokens(model, prompt, plain):
    carry = driver.start(model, prompt, 60)
    pieces = [new for _, new in driver.stream(model, carry, every=7)]
    assert len(pieces) > 1
    assert sum(pieces, []) == driver.committed(plain)[len(prompt) :]


@pytest.mark.parametrize("how", [GREEDY, CONTINUOUS])
def test_an_end_token_ends_the_sequence_and_is_committed(model, prompt, plain, how):
    tokens = driver.committed(plain)[len(prompt) :]
    eos = tokens[25]
    carry = driver.run(model, driver.start(model, prompt, 60, how), how, eos)
    assert driver.committed(carry)[len(prompt) :] == tokens[: tokens.index(eos) + 1]
    assert bool(carry.done[0])


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
def test_a_budget_is_spent_exactly(model, prompt, plain, budget):
    carry = driver.run(model, driver.start(model, prompt, budget))
    expected = driver.committed(plain)[: len(prompt) + budget]
    assert driver.committed(carry) == expected


def test_right_drafts_halve_the_passes(model, prompt, plain, monkeypatch):
    def oracle(model, carry, first, depth, *how):
        at = (0, carry.length[0] + 1)
        guesses = jax.lax.dynamic_slice(plain.tokens, at, (1, depth))
        return carry, guesses, jnp.zeros(1)

    monkeypatch.setattr(cycles, "draft", oracle)
    step = jax.jit(
        lambda model, carry: cycles.cycle(model, carry, jnp.int32(-1), CONTINUOUS)
    )
    carry = driver.start(model, prompt, 60)
    for _ in range(30):
        carry = step(model, carry)
    assert driver.committed(carry) == driver.committed(plain)
    counts = carry.statistics.of()
    assert counts["passes"] == counts["accepted"] == 30


def trace(model, how: Decoding, mtp: bool):
    """Trace the program of a way of decoding, without compiling it."""
    carry = carries.create(model.config, 32, mtp=mtp)
    step = functools.partial(cycles.cycles, decoding=how)
    jax.eval_shape(step, model, carry, jnp.int32(-1), jnp.int32(9))


def test_plain_decoding_drafts_nothing(model, monkeypatch):
    """Property 20 of SPECULATION §7: no draft in the program then, nor a head.

    Continuous decoding, which must be caught, shows that the test sees them.
    """

    def called(*_):
        raise AssertionError("called")

    one = resolve(Ds4Flags(mtp=True), {"DS4_MTP_CONTINUOUS": "0"})
    assert one.mode == GREEDY.mode
    for target, attribute, has_state in (
        (cycles, "draft", True), (MTPHead, "__call__", False),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(target, attribute, called)
            trace(model, GREEDY, has_state)
            with pytest.raises(AssertionError, match="called"):
                trace(model, CONTINUOUS, True)


def test_mistakes_are_told(model):
    with pytest.raises(TokenError, match="prompt: expected at least one token"):
        driver.start(model, [], 4, GREEDY)
    with pytest.raises(TokenError, match=r"prompt: expected ids in 0\.\.95, found 96"):
        driver.start(model, [96], 4)
    with pytest.raises(ConfigError, match="max_tokens: expected at least 0"):
        driver.start(model, [1], -1)
    headless = dataclasses.replace(model, mtp={})
    with pytest.raises(ConfigError, match="expected one with an MTP head"):
        driver.start(headless, [1], 4)
