"""Batches are pure functions of (seed, step); copy documents copy; prompts ask to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.errors import ConfigError
from ds4jax.tokenizer import REQUIRED_SPECIALS, Tokenizer
from ds4jax.train import data
from ds4jax.train.corpus import Document, tokenise

BOS, EOS, NEWLINE = 0, 1, 262
TOKENIZER = Tokenizer(
    [*REQUIRED_SPECIALS, *(chr(i) for i in range(33, 127)),
     *(chr(i) for i in range(161, 173)), *(chr(i) for i in range(174, 324)), "ĊĊ"],
    ["Ċ Ċ"],
)  # fmt: skip
PARAGRAPH = TOKENIZER.encode(data.SEPARATOR)


def lines(letter, count, width, seed=0):
    """Return `count` lines of `letter` and digits, all different."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 10, (count, width))
    return "".join(letter + "".join(map(str, row)) + "\n" for row in digits)


DOCUMENTS = {
    "code": [Document(lines("c", 60, 9, seed), "code") for seed in range(6)],
    "prose": [Document(lines("p", 4, 300, seed), "prose") for seed in range(6)],
}
TOKENS = {name: tokenise(TOKENIZER, found) for name, found in DOCUMENTS.items()}


def batches(tokens=TOKENS, batch=4, rows=640, copy_share=0.5, seed=0, **more):
    return data.Batches(TOKENIZER, tokens, batch, rows, copy_share, seed, **more)


def test_vocabulary_of_this_file():
    assert TOKENIZER.vocab_size == 263 and PARAGRAPH == [NEWLINE]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.floats(0, 1))
def test_a_batch_depends_on_seed_and_step_only(seed, step, share):
    first, second = (
        batches(seed=seed, copy_share=share),
        batches(seed=seed, copy_share=share),
    )
    second.at(step + 1)
    batch = first.at(step)
    assert batch.shape == (4, 642) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, second.at(step))
    np.testing.assert_array_equal(batch, first.at(step))
    assert not np.array_equal(batch, first.at(step + 1))
    assert not np.array_equal(batch, batches(seed=seed + 1, copy_share=share).at(step))


def test_windows_are_windows_of_one_class():
    plain = batches(batch=64, rows=30, copy_share=0.0)
    wrapped = {
        name: np.append(tokens, tokens[:31]).astype(np.int32).tobytes()
        for name, tokens in TOKENS.items()
    }
    for row in plain.at(0):
        assert any(row.tobytes() in text for text in wrapped.values())


def test_classes_are_drawn_by_their_tokens_or_by_weight():
    only = {"code": np.full(50, 7, np.uint16), "prose": np.full(950, 8, np.uint16)}
    drawn = batches(only, batch=4000, rows=1, copy_share=0.0).at(0)
    assert 0.93 < (drawn[:, 0] == 8).mean() < 0.97
    weighted = {"code": 3.0, "prose": 1.0}
    drawn = batches(only, 4000, 1, copy_share=0.0, weights=weighted).at(0)
    assert 0.22 < (drawn[:, 0] == 8).mean() < 0.28


def test_short_classes_wrap_round():
    batch = batches({"only": np.arange(7, dtype=np.uint16)}, copy_share=0.0).at(3)
    np.testing.assert_array_equal(np.diff(batch) % 7, 1)


def copy_documents(row):
    """Return the copy documents of a sequence, the last perhaps cut."""
    starts = [*np.flatnonzero(row == BOS), row.size]
    return [row[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def test_copy_sequences_hold_copies_only():
    batch = batches(copy_share=1.0, batch=16).at(0)
    texts = [d.text for found in DOCUMENTS.values() for d in found]
    lengths = []
    for row in batch:
        *whole, last = copy_documents(row)
        assert row[0] == BOS and sum(map(len, whole)) + len(last) == row.size
        for document in whole:
            length = (document.size - 3) // 2
            passage = document[1 : 1 + length]
            expected = [BOS, *passage, NEWLINE, *passage, EOS]
            np.testing.assert_array_equal(document, expected)
            text = TOKENIZER.decode(passage)
            assert any("\n" + text in "\n" + whole_text for whole_text in texts)
            lengths.append(length)
    low, high = data.PASSAGE_TOKENS
    assert low <= min(lengths) < 60 and 200 < max(lengths) <= high


def test_copy_share_is_a_probability():
    batch = batches(copy_share=0.25, batch=2000, rows=60).at(0)
    # A copy sequence starts with BOS; a window does so once in hundreds of times.
    assert 0.21 < (batch[:, 0] == BOS).mean() < 0.30


def test_passages_favour_code():
    shares = batches()._line_share
    sizes = np.array([tokens.size for tokens in TOKENS.values()]) * [2, 1]
    np.testing.assert_allclose(shares, sizes / sizes.sum())
    first = batches(copy_share=1.0, batch=2000, rows=30).at(0)[:, 1]
    code = (first == TOKENIZER.encode("c")[0]).mean()
    assert abs(code - shares[0]) < 0.04


def test_a_class_without_passages_gives_none():
    tokens = TOKENS | {"short": tokenise(TOKENIZER, [Document("s" * 20, "s")] * 9)}
    batch = batches(tokens, copy_share=1.0, batch=64).at(0)
    assert not np.isin(batch, TOKENIZER.encode("s")).any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch": 0}, "batch: .*found 0"),
        ({"rows": 0}, "rows: .*found 0"),
        ({"seed": -1}, "seed: .*found -1"),
        ({"copy_share": 1.5}, r"copy_share: .*found 1\.5"),
        ({"tokens": {}}, "tokens: "),
        ({"tokens": TOKENS | {"none": TOKENS["code"][:0]}}, "tokens: .*'none': 0"),
        ({"weights": {"code": 1.0}}, r"weights: .*'prose'"),
        ({"weights": {"code": -1.0, "prose": 1.0}}, "weights: "),
        ({"weights": {"code": 0.0, "prose": 0.0}}, "weights: "),
        ({"tokens": {"code": TOKENS["code"][:20]}}, "copy_share: no document"),
    ],
)
def test_refused_arguments(arguments, named):
    with pytest.raises(ConfigError, match=named) as caught:
        batches(**arguments)
    assert "\n" not in str(caught.value)


def held_out():
    return [document for found in DOCUMENTS.values() for document in found]


@settings(deadline=None, max_examples=20)
@given(st.integers(24, 300), st.integers(0, 23), st.integers(0, 2**40))
def test_copy_prompts(passage, seen, seed):
    prompts = data.copy_prompts(held_out(), TOKENIZER, 12, passage, seen, seed)
    assert len(prompts) == 12
    homes = []
    for prompt, continuation in prompts:
        assert prompt.dtype == continuation.dtype == np.int32
        text = prompt[1 : 1 + passage]
        copy = np.concatenate([prompt[2 + passage :], continuation])
        np.testing.assert_array_equal(prompt[[0, 1 + passage]], [BOS, NEWLINE])
        np.testing.assert_array_equal(copy, text)
        assert prompt.size == 2 + passage + seen
        spelt = "\n" + TOKENIZER.decode(text)
        homes += [i for i, d in enumerate(held_out()) if spelt in "\n" + d.text]
    assert sorted(homes) == list(range(12))  # as many as there are documents
    again = data.copy_prompts(held_out(), TOKENIZER, 12, passage, seen, seed)
    np.testing.assert_array_equal(
        [p.prompt for p in prompts], [p.prompt for p in again]
    )


def test_copy_prompts_beyond_one_per_document():
    documents = DOCUMENTS["code"]
    prompts = data.copy_prompts(documents, TOKENIZER, 30, 24, 8, 0)
    assert len({prompt.prompt.tobytes() for prompt in prompts}) == 30
    homes = [
        i
        for prompt, _ in prompts
        for i, d in enumerate(documents)
        if TOKENIZER.decode(prompt[1:25]) in d.text
    ]
    np.testing.assert_array_equal(np.bincount(homes), [5] * 6)


def test_refused_prompts():
    with pytest.raises(ConfigError, match="seen: .*found 24"):
        data.copy_prompts(held_out(), TOKENIZER, 1, 24, 24, 0)
    with pytest.raises(ConfigError, match="count: expected at most 0"):
        data.copy_prompts(held_out(), TOKENIZER, 1, 5000, 8, 0)
