"""The oracles: properties 30 and 31, and what each kind of bad stream is told.

The drafter is a stub that knows plain's tokens and errs on purpose, so that a random
model accepts drafts of every place and the verifier alone decides what is committed.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ds4jax.decode import cycles, driver, oracles, transitions
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode
from ds4jax.errors import CapacityError, ConfigError, TokenError

TOKENS = 150
PROMPT = np.random.default_rng(0).integers(0, 96, 37).tolist()


@pytest.fixture(scope="module")
def model():
    """A model whose every wrong token is a bad one: its logits are wide apart."""
    return scaled(models.lively(models.slim_config()), 8)


def scaled(model, factor):
    """Return `model` with its logits times `factor`."""
    head = model.trunk["output.weight"]
    assert isinstance(head, jax.Array)
    return dataclasses.replace(
        model, trunk=model.trunk | {"output.weight": head * factor}
    )


@pytest.fixture(scope="module")
def plain(model):
    return driver.run(model, driver.start(model, PROMPT, TOKENS, GREEDY), GREEDY)


@pytest.fixture(scope="module")
def started(model):
    return driver.start(model, PROMPT, TOKENS, CONTINUOUS)


@pytest.fixture(scope="module")
def proposals(plain):
    """Plain's tokens, a quarter of them replaced by the token before."""
    tokens = np.array(plain.tokens[0])
    wrong = np.random.default_rng(1).random(len(tokens)) < 0.25
    return np.where(wrong, np.roll(tokens, 1), tokens)


def swap_rows(model, carry, block, verifier):
    """Verify, and give each row's logits out as another's."""
    out = transitions.verify(model, carry, block, verifier)
    return dataclasses.replace(out, logits=out.logits[:, ::-1])


def choose_by_row_0(logits, positions, rng, temperature):
    """Let the first row speak for all: the kind of mistake that #358 mended."""
    tokens = transitions.choose(logits, positions, rng, temperature)
    return jnp.broadcast_to(tokens[:, :1], tokens.shape)


def commit_one_more(carry, out, block, count, eos, decoding):
    """Commit the draft that was rejected, too."""
    count = jnp.minimum(count + 1, block.shape[1])
    return transitions.commit(carry, out, block, count, eos, decoding)


BUGS = {
    "verify": swap_rows,
    "choose": choose_by_row_0,
    "commit": commit_one_more,
}
"""Planted in `cycles`, by the name of what they replace."""


@functools.partial(jax.jit, static_argnames=("decoding", "bug"))
def decode(model, carry, proposals, decoding, bug=None):
    def draft(model, carry, first, depth, temperature, pairing):
        guesses = jax.lax.dynamic_slice(proposals, carry.length + 1, (depth,))
        dropped = transitions.drop_anchor(carry, carry.active)
        return dropped, guesses[None], jnp.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        if bug:
            patch.setattr(cycles, bug, BUGS[bug])
        limit = jnp.int32(2**30)
        return cycles.cycles(model, carry, jnp.int32(-1), limit, decoding, draft)


def judge(model, carry, decoding, tolerance=oracles.TIE_TOLERANCE):
    return oracles.verify_depth(
        model,
        driver.committed(carry),
        len(PROMPT),
        decoding,
        carry.statistics.of()["accepted"],
        tolerance,
    )


def test_plain_decodings_own_stream_has_no_gap(model, plain):
    verdict = judge(model, plain, GREEDY, oracles.EXACT_TOLERANCE)
    assert verdict.passes and verdict.worst == 0
    assert verdict.position == len(PROMPT)
    assert verdict.divergence.histogram == (TOKENS, 0, 0, 0, 0, 0, 0)
    assert verdict.divergence.rate == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["chained", "continuous"])
def test_an_exact_stream_has_no_gap(model, plain, started, proposals, kind, depth):
    """Property 30.  Seen red with each of BUGS, below."""
    how = Decoding(mode=Mode(kind, depth))
    carry = decode(model, started, proposals, how)
    verdict = judge(model, carry, how, oracles.EXACT_TOLERANCE)
    assert verdict.passes, verdict.failures
    assert verdict.worst == 0 and verdict.divergence.diverged == 0
    assert verdict.kind == kind
    assert driver.committed(carry) == driver.committed(plain)
    counts = carry.statistics
    accepted, drafted = (
        np.asarray(x)[0, :depth] for x in (counts.accepted, counts.drafted)
    )
    # Or it would say nothing of either outcome.
    assert (0 < accepted).all() and (accepted < drafted).all()


def test_a_batched_verifier_stays_within_a_tie(model, started, proposals):
    how = Decoding(mode=Mode("continuous", 3, "batched"))
    carry = decode(model, started, proposals, how)
    verdict = judge(model, carry, how)
    assert verdict.passes, verdict.failures


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_at_depth_3(model, started, proposals, bug):
    """Without the bug this is `test_an_exact_stream_has_no_gap`."""
    how = Decoding(mode=Mode("continuous", 3))
    carry = decode(model, started, proposals, how, bug)
    verdict = judge(model, carry, how)
    assert verdict.worst > oracles.TIE_TOLERANCE
    assert verdict.divergence.histogram[-1] > 0
    (line,) = verdict.failures
    assert line.startswith("continuous: expected gaps of at most 2, found ")


def test_the_worst_token_is_named(model, plain):
    tokens = driver.committed(plain)
    tokens[-1] = (tokens[-1] + 1) % 96
    verdict = oracles.verify_depth(model, tokens, len(PROMPT), GREEDY)
    assert verdict.position == len(tokens) - 1
    assert verdict.divergence.diverged == 1
    (line,) = verdict.failures
    assert line.endswith(f" at position {len(tokens) - 1}")
    measured = oracles.divergence(model, tokens, len(PROMPT))
    assert measured == verdict.divergence
    assert measured.rate == 1 / TOKENS


def test_a_gap_is_what_the_logits_say(model, plain):
    """Against the logits after a prefill of all tokens before, another class."""
    tokens = driver.committed(plain)[:60]
    # A text of its own from here on, of which plain would hardly choose a token.
    tokens[40:] = np.random.default_rng(2).integers(0, 96, 20).tolist()
    gaps = oracles.argmax_gaps(model, tokens, len(PROMPT))
    expected = []
    for length in range(len(PROMPT), 60):
        carry = driver.start(model, tokens[:length], 100, GREEDY)
        logits = np.array(carry.logits[0])
        expected.append(logits.max() - logits[tokens[length]])
    np.testing.assert_allclose(gaps, expected, atol=1e-3)
    assert (gaps[:3] == 0).all() and (gaps[3:] > 2).sum() > 15


def test_equally_likely_tokens_have_no_gap(model):
    """A stream of the lowest id is plain's, whatever the weights: all logits are 0."""
    flat = scaled(model, 0)
    carry = driver.run(flat, driver.start(flat, PROMPT, TOKENS, GREEDY), GREEDY)
    tokens = driver.committed(carry)
    assert tokens[len(PROMPT) :] == [0] * TOKENS
    assert oracles.divergence(flat, tokens, len(PROMPT)).diverged == 0


def test_a_short_stream_fails(model, plain):
    tokens = driver.committed(plain)
    most = len(PROMPT) + oracles.MORE_THAN
    short = oracles.verify_depth(model, tokens[:most], len(PROMPT), GREEDY)
    assert short.failures == ("plain: expected more than 128 tokens, found 128",)
    longer = oracles.verify_depth(model, tokens[: most + 1], len(PROMPT), GREEDY)
    assert longer.passes


def test_only_plain_decoding_needs_no_accepted_draft(model, plain):
    tokens = driver.committed(plain)
    idle = oracles.cont_argmax_gap(model, tokens, len(PROMPT), accepted=0)
    assert idle.failures == ("continuous: expected an accepted draft, found none",)
    assert not idle.passes
    assert oracles.cont_argmax_gap(model, tokens, len(PROMPT), accepted=1).passes
    assert oracles.verify_depth(model, tokens, len(PROMPT), GREEDY).passes


def test_a_nan_is_the_worst_gap(model, plain):
    verdict = judge(scaled(model, np.nan), plain, GREEDY)
    assert verdict.failures == (
        f"plain: expected gaps of at most 2, found nan at position {len(PROMPT)}",
    )
    assert verdict.divergence.histogram == (0, 0, 0, 0, 0, 0, TOKENS)


def test_the_histogram_counts_each_gap_once():
    gaps = [0, 0, 5e-4, 0.001, 0.002, 0.1, 0.3, 2.0, 2.1, np.inf, np.nan]
    found = oracles.Divergence.of(np.array(gaps))
    assert found.histogram == (2, 2, 1, 1, 1, 1, 3)
    assert (found.tokens, found.diverged) == (11, 9)


def test_the_prompt_is_read_as_the_run_read_it(model, monkeypatch):
    """Another context or chunk is another program, with other last bits."""

    class Read(Exception):
        pass

    def prefill(model, carry, tokens, decoding):
        raise Read(carry.max_context, tokens, decoding.prefill_chunk, decoding.mode)

    monkeypatch.setattr(driver, "prefill", prefill)
    how = dataclasses.replace(CONTINUOUS, prefill_chunk=16)
    with pytest.raises(Read) as caught:
        oracles.verify_depth(model, [1, 2, 3], 2, how, 1, max_context=512)
    assert caught.value.args == (512, [1, 2], 16, GREEDY.mode)


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "options", "error", "line"),
    [
        ([1, 2], 2, {}, ConfigError, "prompt_length: expected a prompt and something "
         "after it in 2 tokens, found 2"),
        ([1, 2], 0, {}, ConfigError, "prompt_length: .* found 0"),
        ([], 1, {}, ConfigError, "prompt_length: .* in 0 tokens, found 1"),
        ([1, 96], 1, {}, TokenError, r"tokens: expected ids in 0\.\.95, found 96"),
        ([-1, 1], 1, {}, TokenError, "found -1"),
        ([1, 2, 3], 1, {"max_context": 2}, CapacityError,
         "max_context: expected room for 3 tokens, found 2"),
    ],
)  # fmt: skip
def test_mistakes_are_told(model, tokens, prompt_length, options, error, line):
    with pytest.raises(error, match=line) as caught:
        oracles.argmax_gaps(model, tokens, prompt_length, **options)
    assert "\n" not in str(caught.value)


def digest(carry) -> str:
    """Return the sha256 of everything a carry holds, garbage and all."""
    carry = dataclasses.replace(carry, rng=jax.random.key_data(carry.rng))
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(carry)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def run_continuous(model):
    carry = driver.start(model, PROMPT, TOKENS, CONTINUOUS)
    return digest(driver.run(model, carry, CONTINUOUS))


def test_a_run_again_is_the_same_also_when_compiled_again(model, monkeypatch):
    """Property 31.  Seen red with one bit of the second prefill's cache changed."""
    first = run_continuous(model)
    assert run_continuous(model) == first

    compiled = []

    def anew(function):
        # Another function, since jit remembers the programs of one it has seen.
        def again(*args, decoding):
            compiled.append(function)
            return function(*args, decoding)

        return jax.jit(again, static_argnames="decoding")

    monkeypatch.setattr(driver, "_prefill", anew(transitions.prefill))
    monkeypatch.setattr(driver, "_cycles", anew(cycles.cycles))
    # Nor may the programs come from the folder of those compiled earlier.
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert run_continuous(model) == first
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    assert compiled == [transitions.prefill, cycles.cycles]
