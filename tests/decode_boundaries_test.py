"""Drafts at every edge: of windows, rings, budgets, the context, and the text itself.

Numbers in docstrings are those of SPECULATION §7.
"""

import decoding
import models
import numpy as np
import pytest
from decoding import CONTEXT, ahead, assert_same_as_plain, misses, run, script

from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.modes import Decoding, Mode
from ds4jax.errors import CapacityError

CONTINUOUS, DEEP, CHAINED = (
    Mode("continuous", 1), Mode("continuous", 4), Mode("chained", 4),
)  # fmt: skip
MODES = {"continuous": CONTINUOUS, "deep": DEEP, "chained": CHAINED}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
PROMPT = 37
same = np.testing.assert_array_equal


@pytest.fixture(scope="module")
def start(model):
    return decoding.start(model, PROMPT)


@pytest.fixture(scope="module")
def truth(model, start):
    """Return the prompt and what plain decoding makes of it."""
    return driver.committed(run(model, start, budget=60))


@pytest.mark.parametrize("residue", range(16))
def test_a_miss_leaves_what_plain_decoding_leaves(model, start, truth, residue):
    """Properties 5 and 9: of every length mod 4 and 16, at every place of a draft.

    The miss of the first draft leaves one token, the anchor its streams.  Seen red
    with `length` one too long after a miss, and with the anchor of the last row.
    """
    before = ahead(model, start, residue)
    length = PROMPT + residue
    plain = [ahead(model, before, tokens) for tokens in range(7)]
    for mode in MODES.values():
        base = int(mode.kind == "chained")
        for place in range(1, mode.depth + 1):
            wrong = script(truth, [length + base + place])
            carry = run(model, before, mode, wrong, budget=20, limit=1)
            counts = carry.statistics.of()
            assert counts["accepted"] == place - 1
            assert counts["committed"] == base + place
            assert_same_as_plain(model, carry, plain[base + place])
            assert carry.anchor is not None
            same(carry.anchor.position, length + base + place - 1)


@pytest.fixture(scope="module")
def wide():
    """Return a model with the ratio of 128 of the real one, in its only layer."""
    return models.lively(models.micro_config(layers=1, compress_ratios=(128,)))


def test_a_miss_at_every_residue_of_128(wide):
    """Property 9: one miss per token for more than a period leaves plain's state.

    Twice the window of 128 ends on the way, by a row kept and by a row rejected.
    """
    start = decoding.start(wide, 60)
    plain = run(wide, start)
    tokens = driver.committed(plain)
    assert len(tokens) == CONTEXT
    for kept in ([1], [2], [2, 1], [1, 2]):
        told = script(tokens, misses(60, kept * CONTEXT))
        assert_same_as_plain(wide, run(wide, start, CONTINUOUS, told), plain)


@pytest.mark.parametrize("length", [125, 126, 127, 128, 129, 253, 254])
def test_a_miss_where_a_window_of_128_ends(wide, length):
    """Property 9: the state right after the cycle, not only at a text's end."""
    before = decoding.start(wide, length)
    tokens = driver.committed(ahead(wide, before, 2))
    for kept in (1, 2):
        wrong = [length + 1] if kept == 1 else []
        carry = run(wide, before, CONTINUOUS, script(tokens, wrong), limit=1)
        assert carry.statistics.of()["committed"] == kept
        assert_same_as_plain(wide, carry, ahead(wide, before, kept))


def edges():
    """Return the lengths about which a window fills up or a ring comes round."""
    config = models.micro_config()
    rings = set()
    for layer in carries.create(config, CONTEXT, mtp=False).cache.layers:
        rings.add(layer.raw.shape[1])
        states = (layer.compressor, layer.indexer)
        rings |= {state.inputs.shape[1] for state in states if state}
    return sorted({config.window} | rings | {2 * ring for ring in rings})


@pytest.mark.parametrize("edge", edges())
def test_drafts_over_the_edge_of_a_ring(model, edge):
    """Property 10: from one below the ring's size, the size, and one above it."""
    lowest = ahead(model, decoding.start(model, 5), edge - 1 - 5)
    tokens = driver.committed(ahead(model, lowest, 14))
    for beyond in range(3):
        before = ahead(model, lowest, beyond)
        for mode, kept in (
            (CONTINUOUS, [1, 2, 1, 2, 2, 1, 2]),
            (DEEP, [1, 5, 3, 2]),
            (CHAINED, [1, 5, 2]),
        ):
            base = int(mode.kind == "chained")
            told = script(tokens, misses(edge - 1 + beyond, kept, base))
            carry = run(model, before, mode, told, limit=len(kept), budget=11)
            assert carry.statistics.of()["committed"] == 11
            assert_same_as_plain(model, carry, ahead(model, before, 11))


@pytest.fixture(scope="module")
def ending(truth):
    """Return an end token and its position, the first where it is committed."""
    for position in range(PROMPT + 8, len(truth)):
        if truth[position] not in truth[PROMPT:position]:
            return truth[position], position
    raise AssertionError("every token repeats")


@pytest.mark.parametrize(
    "mode, place",
    [(CONTINUOUS, place) for place in range(2)]
    + [(DEEP, place) for place in range(5)]
    + [(CHAINED, place) for place in range(6)],
)
def test_an_end_token_ends_a_block(model, start, truth, ending, mode, place):
    """Property 23: end token first in a block, or at any place of right drafts.

    All drafts beyond it are right, too.  Nothing is committed after it, however often
    cycles run again.  Seen red with `commit` not cut at the end token.
    """
    eos, position = ending
    before = ahead(model, start, position - place - PROMPT)
    carry = run(model, before, mode, script(truth), budget=20, limit=1, eos=eos)
    assert carry.statistics.of()["committed"] == place + 1
    assert bool(carry.done[0]) and not bool(carry.active[0])
    assert driver.committed(carry) == truth[: position + 1]
    assert_same_as_plain(model, carry, ahead(model, before, place + 1))
    again = run(model, carry, mode, eos=eos)
    same(again.tokens, carry.tokens)
    models.assert_same(again.statistics, carry.statistics)


@every_mode
def test_a_rejected_end_token_ends_nothing(model, start, truth, ending, mode):
    """Property 23: an end token that was only guessed leaves no trace."""
    eos, position = ending
    base = int(mode.kind == "chained")
    guesses = truth.copy()
    guesses[PROMPT + base + 1] = eos
    carry = run(model, start, mode, script(guesses), budget=40, limit=1, eos=eos)
    assert carry.statistics.of()["committed"] == base + 1
    assert not bool(carry.done[0])
    assert_same_as_plain(model, carry, ahead(model, start, base + 1))
    carry = run(model, carry, mode, script(guesses), eos=eos)
    assert bool(carry.done[0])
    assert driver.committed(carry) == truth[: position + 1]


@every_mode
@pytest.mark.parametrize("right", [True, False])
def test_a_budget_is_never_exceeded(model, start, truth, mode, right):
    """Property 24: budgets one after the other come to their sum, exactly."""
    told = script(truth, () if right else range(len(truth)))
    carry, total = start, 0
    for budget in (0, 1, 2, 3, 0, 4, 5, 6, 1):
        carry, total = run(model, carry, mode, told, budget=budget), total + budget
        assert carry.statistics.of()["committed"] == budget
        assert int(carry.budget[0]) == 0
        assert driver.committed(carry) == truth[: PROMPT + total]
    assert_same_as_plain(model, carry, ahead(model, start, total))


@every_mode
@pytest.mark.parametrize("room", range(6))
def test_a_full_context_is_not_overrun(model, mode, room):
    """Property 25: what is left is filled, and nothing is written beyond it.

    A write that was clamped to the end would spoil the last token or compressed row,
    all of which are visible then.  Seen red with `scatter` clamping, and with `allowed`
    blind to the room.
    """
    before = decoding.start(model, CONTEXT - room)
    plain = run(model, before, budget=50)
    tokens = driver.committed(plain)
    assert len(tokens) == CONTEXT
    # The token beyond the end is guessed right, too: only the room stops it.
    told = script([*tokens, int(plain.logits[0].argmax())])
    carry = run(model, before, mode, told, budget=50)
    assert carry.statistics.of()["committed"] == room
    assert int(carry.budget[0]) == 50 - room and not bool(carry.active[0])
    assert_same_as_plain(model, carry, plain)


def test_a_full_context_is_told(model):
    """Property 25: one line that names what does not fit."""
    full = decoding.start(model, CONTEXT)
    with pytest.raises(CapacityError, match=r"^context: 257 tokens do not fit in 256;"):
        driver.prefill(model, full, [1])
    with pytest.raises(CapacityError, match=r"^context: 257 tokens do not fit in 256;"):
        driver.sync(model, full, [1] * CONTEXT)


@pytest.mark.parametrize("chunk, depth", [(1, 0), (2, 1), (3, 2)])
def test_a_verification_fits_a_prefill_chunk(chunk, depth):
    """Property 26: chunks of few rows cut the depth, down to plain (antirez/ds4#381).

    ds4 aborted; here it is plain decoding after the same prefill, bit for bit.  Of a
    model of one layer: each chunk has programs of its own.
    """
    model = models.lively(models.slim_config())
    how = Decoding(mode=DEEP, prefill_chunk=chunk)
    assert how.depth == depth
    prompt = models.text(model.config, PROMPT)[0].tolist()
    carry = driver.start(model, prompt, 40, how)
    plain = run(model, carry)
    carry = run(model, carry, how)
    assert_same_as_plain(model, carry, plain)
    counts = carry.statistics.of()
    # The last cycles of a budget have leave for fewer drafts.
    assert counts["drafted"] <= depth * counts["passes"] <= counts["drafted"] + depth**2
