"""Stops, looked for in tokens that come in pieces; streams are in `session_test`."""

import pytest
import shipped
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.decode.modes import Decoding, Mode
from ds4jax.decode.stops import Stops, most_cycles
from ds4jax.errors import ConfigError
from ds4jax.model.cache import DEFAULT_SLACK
from ds4jax.train.corpus import Document, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document(shipped.TEXT, "prose")], 280)


def test_most_cycles_can_be_taken_back():
    """Whatever was committed, a rewind to the first of its tokens is in reach."""
    for mode in [
        Mode("plain", 0),
        *(Mode(kind, d) for kind in ("chained", "continuous") for d in range(1, 5)),
    ]:
        cycles = most_cycles(Decoding(mode=mode))
        rows = 1 + mode.depth + (mode.kind == "chained")
        assert cycles >= 1 and cycles * rows <= DEFAULT_SLACK < (cycles + 1) * rows + 1


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_stops_of_ids_are_found_where_a_search_of_the_whole_finds_them(
    tokens, stops, size
):
    ends = [
        end for end in range(1, len(tokens) + 1)
        if any(tokens[:end][-len(stop) :] == stop for stop in stops)
    ]  # fmt: skip
    assert found_at(Stops(stops), tokens, size) == (min(ends) if ends else None)


def found_at(stops, tokens, size):
    """Return where tokens that come in pieces are stopped."""
    for at in range(0, len(tokens), size):
        count = stops.find(tokens[at : at + size])
        if count is not None:
            return at + count
    return None


@pytest.fixture(scope="module")
def bytewise():
    """Return a tokenizer with a token for each byte but few others."""
    return train_tokenizer([Document("ab " * 50, "prose")], 265)


LETTERS = "aé海🙂 b"


@given(
    st.text(LETTERS, max_size=8),
    st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3),
    st.integers(1, 4),
)
def test_stops_of_text_are_found_across_cut_characters(bytewise, text, stops, size):
    """Seen red with each token decoded by itself."""
    tokens = bytewise.encode(text)
    ends = [
        end for end in range(1, len(tokens) + 1)
        if any(stop in bytewise.decode(tokens[:end]) for stop in stops)
    ]  # fmt: skip
    found = found_at(Stops(stops, bytewise), tokens, size)
    assert found == (min(ends) if ends else None)


def test_a_stop_may_be_a_special_token_or_a_part_of_a_token(tokenizer):
    ids = tokenizer.encode("calm") + [tokenizer.eos]
    assert Stops("of▁sentence", tokenizer).find(ids) == len(ids)
    assert Stops("al", tokenizer).find(ids) is not None
    mixed = Stops(["zz", [ids[0]]], tokenizer)
    assert mixed and mixed.find(ids) == 1
    assert not Stops()


@pytest.mark.parametrize(
    "stop, told",
    [
        ("a", "stop: expected ids where there is no tokenizer, found 'a'"),
        ([""], "stop: expected something to find, found ''"),
        ([[]], r"stop: expected something to find, found \[\]"),
        ([3, 4], "stop: expected texts or lists of ids, found 3"),
    ],
)
def test_stops_that_cannot_be_are_told(stop, told):
    with pytest.raises(ConfigError, match=told):
        Stops(stop)
