"""ds4's pairing of the head, (h_p, t_p): other drafts, the same tokens."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.decode.modes import GREEDY, Decoding, Mode
from ds4jax.model.mtp import pair

_draft = jax.jit(transitions.draft, static_argnames=("depth", "pairing"))


@pytest.fixture(scope="module")
def model():
    return models.lively(models.slim_config())


def prompt(model):
    return models.text(model.config, 40)[0].tolist()


@pytest.mark.parametrize("fill", [True, False])
def test_the_tokens_are_plains(model, fill):
    plain = driver.run(model, driver.start(model, prompt(model), 40, GREEDY), GREEDY)
    how = Decoding(mode=Mode("continuous", 2), pairing="ds4", fill=fill)
    carry = driver.run(model, driver.start(model, prompt(model), 40, how), how)
    assert driver.committed(carry) == driver.committed(plain)
    assert carry.statistics.of()["drafted"] > 0


def test_a_draft_is_the_heads_own_second_guess(model):
    """The rows before are (h_i, t_i), and the guess is made of `first`."""
    config, tokens = model.config, prompt(model)
    how = Decoding(mode=Mode("continuous", 1), pairing="ds4")
    text = jnp.array([tokens], jnp.int32)
    out = models.trunk(model, text)
    streams, paired = pair(out.streams, text, "ds4")
    cache = models.fresh(config, mtp=True)
    head = models.mtp(model, paired, streams, cache)
    first = np.argmax(out.logits[:, -1], axis=-1).astype(np.int32)
    last = models.mtp(model, first[:, None], head.streams[:, -1:], head.cache)
    carry = carries.with_budget(driver.start(model, tokens, 8, how), 8)
    assert int(transitions.first_token(carry)[0]) == first[0]
    carry, guesses, lead = _draft(model, carry, first, depth=1, pairing="ds4")
    best = np.sort(np.asarray(last.logits[0, -1]))[::-1]
    assert int(guesses[0, 0]) == int(np.argmax(last.logits[0, -1]))
    np.testing.assert_allclose(lead[0], best[0] - best[1], atol=1e-4)
