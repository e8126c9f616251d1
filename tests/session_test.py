"""A session, and the streams that stops end.

The logits of its model are small, so that sampling goes by noise, which drafts share:
most are right, and blocks of two tokens are committed (`CONTINUOUS` at temperature 1).
"""

import contextlib
import dataclasses

import models
import numpy as np
import pytest
import shipped

from ds4jax.decode import driver
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS
from ds4jax.decode.session import Session
from ds4jax.decode.stops import Stops, stream
from ds4jax.errors import CapacityError, ConfigError, FileError, TokenError
from ds4jax.train.corpus import Document, train_tokenizer

CONFIG = models.slim_config(vocab=280)
SAMPLED = dataclasses.replace(CONTINUOUS, temperature=1.0)
PROMPT = models.text(CONFIG, 41)[0].tolist()
TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document(shipped.TEXT, "prose")], CONFIG.vocab)


@pytest.fixture(scope="module")
def model():
    return models.quiet(CONFIG, 0.05)


@pytest.fixture
def session(model):
    """Return a session that has read PROMPT."""
    session = Session(model, 256, SAMPLED)
    assert session.sync(PROMPT) == "rebuilt"
    return session


@pytest.fixture(scope="module")
def truth(model):
    """Return what follows PROMPT, from the drivers alone; most drafts were right."""
    carry = driver.start(model, PROMPT, TOKENS, SAMPLED)
    carry = driver.run(model, carry, SAMPLED)
    counts = carry.statistics.of()
    assert counts["accepted"] > 0.8 * counts["passes"]
    return driver.committed(carry)[len(PROMPT) :]


def state(session) -> DecodeCarry:
    return session._carry


def assert_same_state(session, other):
    """Compare what both can see, and the anchor."""
    actual, expected = state(session), state(other)
    assert session.tokens == other.tokens
    models.assert_same_state(actual.cache, expected.cache, CONFIG)
    np.testing.assert_array_equal(actual.logits, expected.logits)
    assert actual.anchor is not None and expected.anchor is not None
    for anchor in (actual.anchor, expected.anchor):
        assert int(anchor.position[0]) == session.length - 1
    newest, wanted = (
        anchor.streams[0, int(anchor.rows[0]) - 1]
        for anchor in (actual.anchor, expected.anchor)
    )
    np.testing.assert_array_equal(newest, wanted)


def head_rows(session) -> np.ndarray:
    """Return the rows that the head will see, of which none may lack."""
    head = state(session).mtp_cache
    assert head is not None
    raw, tags = head.layers[0].raw[0], np.asarray(head.layers[0].tags)[0]
    seen = session.length - np.arange(2, CONFIG.window)
    np.testing.assert_array_equal(tags[seen % len(tags)], seen)
    return np.asarray(raw)[seen % len(tags)]


def test_it_decodes_as_the_drivers_do(session, truth):
    assert session.generate(TOKENS) == truth
    assert session.tokens == PROMPT + truth
    assert session.length == len(PROMPT) + TOKENS
    counts = session.statistics
    assert counts["committed"] == TOKENS == counts["passes"] + counts["accepted"]
    assert session.sync(PROMPT) == "rebuilt"
    pieces = list(session.stream(TOKENS, every=3))
    assert sum(pieces, []) == truth and all(pieces) and len(pieces) > 5


def test_the_example_of_the_readme(model, tokenizer):
    session = Session(model, 256, SAMPLED, tokenizer=tokenizer)
    session.sync("The sea was")
    text = tokenizer.decode(session.generate(20, eos=-1))
    assert session.tokens[0] == tokenizer.bos and len(text) > 5
    assert tokenizer.decode(session.tokens[1:]) == "The sea was" + text


def test_sync_says_what_it_could_keep(session, truth):
    session.generate(10)
    assert session.sync(session.tokens) == "kept"
    assert session.sync([*session.tokens, 1, 2]) == "extended"
    assert session.sync([*PROMPT, *truth[:10], 3]) == "rewound"
    assert session.tokens == [*PROMPT, *truth[:10], 3]
    assert session.sync(PROMPT[:3]) == "rebuilt"
    assert session.tokens == PROMPT[:3]


def test_rewind_and_go_on_gives_the_same_text(session, truth):
    session.generate(30)
    least = session.length - 25
    session.rewind(least)
    assert session.tokens == (PROMPT + truth)[:least]
    assert session.generate(25) == truth[5:30]
    with pytest.raises(CapacityError, match="rewind: expected a length in"):
        session.rewind(10)
    assert session.generate(10) == truth[30:40]


def test_invalidate_forgets_every_token(session, truth):
    session.generate(10)
    session.invalidate()
    assert session.tokens == [] and session.length == 0
    assert session.sync(PROMPT) == "rebuilt"
    assert session.generate(10) == truth[:10]


def test_a_saved_session_goes_on_elsewhere(session, truth, model, tmp_path):
    session.generate(11)
    session.save(tmp_path / "a")
    again = Session.load(tmp_path / "a", model, decoding=SAMPLED)
    assert again.tokens == session.tokens and again.max_context == 256
    assert again.statistics == session.statistics
    assert session.generate(10) == again.generate(10) == truth[11:21]
    assert again.statistics["boots"] == 0
    again.rewind(len(PROMPT) + 3)
    assert again.generate(20) == truth[3:23]
    with pytest.raises(FileError, match="none: cannot be read"):
        Session.load(tmp_path / "none", model)


def places_of(truth, found):
    """Return where each stop could be told from all that came before it."""
    text = [tuple(truth[i : i + len(found)]) for i in range(TOKENS - len(found) + 1)]
    return text.index(tuple(found)) + len(found)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tokens_end_with_the_stop_wherever_it_falls(
    session, truth, model, length, monkeypatch
):
    """Stops at every place of blocks, pieces and batches of cycles; nothing beyond.

    What the session then is, is what a budget of as many tokens leaves, and the next
    text extends it: property 35.  Seen red without the rewind, with one to a token
    more or less, and with stops that were looked for in each piece by itself.
    """
    rewinds = []
    rewind = driver.rewind
    monkeypatch.setattr(
        driver, "rewind", lambda *args: (rewinds.append(1), rewind(*args))[1]
    )
    ends = set()
    for start in [*range(0, 12), 20, 31, 40]:
        stop = truth[start : start + length]
        end = places_of(truth, stop)
        ends.add(end)
        # Prefill rounds otherwise than decoding, which a rewind would do.
        session.invalidate()
        session.sync(PROMPT)
        pieces = list(session.stream(TOKENS, stop=[[270, 271], stop]))
        assert sum(pieces, []) == truth[:end]
        assert session.tokens == PROMPT + truth[:end]
    assert len(ends) > 5 and len(rewinds) > len(ends) / 2
    exact = Session(model, 256, SAMPLED)
    exact.sync(PROMPT)
    exact.generate(end)
    assert_same_state(session, exact)
    more = session.tokens + [5, 6]
    assert session.sync(more) == exact.sync(more) == "extended"
    np.testing.assert_array_equal(head_rows(session), head_rows(exact))
    assert session.generate(10) == exact.generate(10)


def test_the_prompt_is_not_searched_and_a_stop_may_be_the_last_token(session, truth):
    stop = [PROMPT[-1], truth[0]]
    assert session.generate(20, stop=[stop]) == truth[:20]
    session.sync(PROMPT)
    assert session.generate(20, stop=[truth[18:20]]) == truth[:20]
    assert session.generate(5, stop=[truth[24:26]]) == truth[20:25]


def test_a_text_may_be_the_stop(session, truth, tokenizer):
    session.tokenizer = tokenizer
    printable = [tokenizer.token_bytes[t].isascii() for t in truth]
    at = next(i for i in range(8, TOKENS - 1) if printable[i] and printable[i + 1])
    parts = [tokenizer.decode([t]) for t in truth[at : at + 2]]
    stop = parts[0][-1] + parts[1][0]
    assert session.generate(TOKENS, eos=-1, stop=stop) == truth[: at + 2]
    assert session.tokens == PROMPT + truth[: at + 2]


def test_an_end_token_is_the_tokenizers_by_default(session, truth, tokenizer):
    end = truth[25]
    count = truth.index(end) + 1
    session.tokenizer = tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "eos", end)
        assert session.generate(TOKENS) == truth[:count]
        session.sync(PROMPT)
        assert session.generate(TOKENS, eos=-1) == truth
    session.tokenizer = None
    session.sync(PROMPT)
    assert session.generate(TOKENS) == truth
    session.sync(PROMPT)
    assert session.generate(TOKENS, eos=end) == truth[:count]


def test_mistakes_are_told_and_leave_the_session_as_it_was(session, truth, tokenizer):
    session.generate(5)
    for error, told, mistake in [
        (TokenError, "prompt: expected at least one", lambda: session.sync([])),
        (TokenError, "found 280", lambda: session.sync([280])),
        (ConfigError, "where there is no tokenizer", lambda: session.sync("a")),
        (CapacityError, "do not fit in 256", lambda: session.sync([1] * 256)),
        (ConfigError, "max_tokens: expected at least 0", lambda: session.stream(-1)),
        (ConfigError, "stop: .* no tokenizer", lambda: session.stream(1, stop=["a"])),
        (CapacityError, "rewind: expected", lambda: session.rewind(99)),
        (FileError, "cannot be written", lambda: session.save("/no/where")),
    ]:
        with pytest.raises(error, match=told):
            mistake()
        assert session.tokens == PROMPT + truth[:5]
    assert session.generate(5) == truth[5:10]
    session.invalidate()
    with pytest.raises(TokenError, match="sync a prompt"):
        session.stream(1)
    session.sync(PROMPT)
    session.generate(1000)
    assert session.length == 256
    with pytest.raises(CapacityError, match="context: all of its 256 tokens are used"):
        session.stream(1)


def test_leaving_a_stream_leaves_what_it_gave(session, truth):
    seen = next(session.stream(TOKENS))
    assert session.tokens == PROMPT + seen
    with contextlib.suppress(KeyboardInterrupt):
        for new in session.stream(TOKENS):
            seen += new
            raise KeyboardInterrupt
    assert session.tokens == PROMPT + seen == (PROMPT + truth)[: session.length]
    assert session.generate(5) == truth[len(seen) :][:5]


def test_a_stream_ends_if_the_session_moves_on(session, truth):
    old = session.stream(TOKENS)
    first = next(old)
    assert session.generate(5) == truth[len(first) : len(first) + 5]
    assert list(old) == []
    assert session.tokens == PROMPT + truth[: len(first) + 5]


def test_an_interrupt_while_the_device_computes_keeps_its_tokens(
    session, truth, monkeypatch
):
    """Seen red with the carry held only when its tokens are given out."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "committed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(TOKENS)
    assert len(PROMPT) < session.length < len(PROMPT) + TOKENS
    assert session.tokens == (PROMPT + truth)[: session.length]
    assert session.generate(5) == truth[session.length - 5 - len(PROMPT) :][:5]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_carry_that_was_given_up_is_not_used_again(model, monkeypatch):
    """A prefill that fails after its first chunk leaves an empty, usable session.

    Its noise stays the same.  Seen red without `_giving_up`, and with another seed.
    """
    prefill, calls = driver._prefill, []

    def fail_later(*args, **kwargs):
        calls.append(1)
        carry = prefill(*args, **kwargs)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return carry

    session = Session(model, 256, SAMPLED, seed=7)
    session.sync(PROMPT)
    expected = session.generate(10)
    monkeypatch.setattr(driver, "_prefill", fail_later)
    with pytest.raises(KeyboardInterrupt):
        session.sync(session.tokens + [1])
    assert session.tokens == []
    assert session.sync(PROMPT) == "rebuilt"
    assert session.generate(10) == expected


def test_seeds_tell_sessions_apart(model, session, truth):
    other = Session(model, 256, SAMPLED, seed=1)
    other.sync(PROMPT)
    assert other.generate(20) != session.generate(20) == truth[:20]


def test_a_stream_needs_no_session(model, truth):
    """Seen red with as many cycles between two looks as were asked for."""
    carry = driver.start(model, PROMPT, TOKENS, SAMPLED)
    seen = []
    for now, new in stream(model, carry, SAMPLED, stops=Stops([truth[20:22]])):
        seen += new
        assert driver.committed(now) == PROMPT + seen
    assert seen == truth[:22]
    # However many cycles are asked for at once, its start stays in reach.
    carry = driver.start(model, PROMPT, TOKENS, SAMPLED)
    early = stream(model, carry, SAMPLED, stops=Stops([truth[:1]]), every=TOKENS)
    assert [new for _, new in early] == [truth[:1]]
    carry = driver.start(model, PROMPT, TOKENS, SAMPLED)
    assert sum((new for _, new in stream(model, carry, SAMPLED)), []) == truth
