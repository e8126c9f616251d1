"""Every mode commits plain decoding's tokens and leaves its state, bit for bit.

Numbers in docstrings are those of SPECULATION §7.
"""

import decoding
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from decoding import assert_same_as_plain, counters, misses, patterns, run, script

from ds4jax.decode import driver, transitions
from ds4jax.decode.modes import GREEDY, Mode
from ds4jax.decode.precedence import Ds4Flags, resolve

optimised = pytest.mark.optimised
PROMPTS = (37, 5, 70)
TOKENS = 96
CONTINUOUS = Mode("continuous", 1)
same = np.testing.assert_array_equal


# Optimised where a mode differs most from the others, which takes twice as long.
every_mode = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(
            Mode(kind, depth),
            id=f"{kind}-{depth}",
            marks=[optimised] if depth in (1, 4) else [],
        )
        for kind in ("continuous", "chained")
        for depth in (1, 2, 3, 4)
    ],
)


@pytest.fixture(scope="module")
def starts(model):
    return [decoding.start(model, tokens, TOKENS) for tokens in PROMPTS]


@pytest.fixture(scope="module")
def plains(model, starts):
    return [run(model, start) for start in starts]


@pytest.fixture(scope="module")
def truth(plains):
    """Return the first prompt and what follows, which right drafts guess."""
    return driver.committed(plains[0])


@every_mode
def test_the_heads_own_drafts_change_nothing(model, starts, plains, mode):
    """Properties 1 and 2, and that chained decoding is as exact as continuous.

    Seen red with `agreement` counting one row too many, and with an anchor that takes
    the row after the last one kept.
    """
    for start, plain in zip(starts, plains, strict=True):
        carry = run(model, start, mode)
        assert driver.committed(carry) == driver.committed(plain)
        assert_same_as_plain(model, carry, plain)
        counts = carry.statistics.of()
        drafts = counts["passes"] - counts["decodes"]
        assert counts["committed"] == TOKENS and drafts > 1


@every_mode
def test_any_part_of_a_draft_may_be_right(model, starts, plains, truth, mode):
    """Property 32, and 38 by place: 1..depth+1 tokens kept, each over and over.

    Seen red with rows chosen one off in `_advance`.
    """
    base = int(mode.kind == "chained")
    for counts in patterns(mode.depth, TOKENS):
        told = script(truth, misses(PROMPTS[0], counts, base))
        carry = run(model, starts[0], mode, told)
        assert_same_as_plain(model, carry, plains[0])
        for counter, expected in counters(counts, mode, TOKENS).items():
            found = getattr(carry.statistics, counter)[0]
            same(found, expected, err_msg=f"{counter} of {counts[:4]}")


@optimised
@pytest.mark.parametrize(
    "kept, reads",
    [([2], 1 / 2), ([1], 1.0), ([2, 1], 2 / 3)],
    ids=["right", "wrong", "in turn"],
)
def test_reads_per_token(model, starts, plains, truth, kept, reads):
    """Properties 6, 7 and 8: passes of a continuous token, exactly."""
    told = script(truth, misses(PROMPTS[0], kept * TOKENS))
    carry = run(model, starts[0], CONTINUOUS, told)
    assert_same_as_plain(model, carry, plains[0])
    counts = carry.statistics.of()
    assert counts["passes"] / counts["committed"] == reads
    assert counts["decodes"] == counts["boots"] == 0


@pytest.mark.parametrize("drafts", [1, 3, 4])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 31])
def test_strict_is_plain(model, starts, plains, truth, drafts, budget):
    """Property 21: `--quality` under `DS4_MTP_CONTINUOUS`, to the last token.

    Right drafts would run over both the budget and the end token.
    """
    flags = Ds4Flags(mtp=True, mtp_draft=drafts, quality=True)
    mode = resolve(flags, {"DS4_MTP_CONTINUOUS": "1"}).mode
    assert mode == (Mode("chained", drafts - 1) if drafts > 1 else GREEDY.mode)
    expected = truth[: PROMPTS[0] + budget]
    for told in (script(), script(truth)):
        carry = run(model, starts[0], mode, told, budget=budget)
        assert driver.committed(carry) == expected
        assert_same_as_plain(model, carry, run(model, starts[0], budget=budget))
        # The same token now ends the text, or one before it that is equal.
        ends = dict(budget=budget + 4, eos=expected[-1])
        carry = run(model, starts[0], mode, told, **ends)
        assert bool(carry.done[0]) and len(driver.committed(carry)) <= len(expected)
        assert_same_as_plain(model, carry, run(model, starts[0], **ends))


_verify = jax.jit(transitions.verify)


def block(*tokens):
    return jnp.asarray([tokens], jnp.int32)


def kept(model, out):
    """Return what a pass leaves if only its first row is kept."""
    first = jax.tree.map(lambda x: x[:, :1], (out.logits, out.streams))
    length = out.cache.length - (out.logits.shape[1] - 1)
    return first, models.poison(out.cache.replace(length=length), model.config)


@optimised
def test_the_first_row_does_not_depend_on_the_second(model, starts):
    """Property 3, and that nothing of a rejected row stays: 100 random tokens."""
    expected = kept(model, _verify(model, starts[0], block(7, 0)))
    for token in np.random.default_rng(0).integers(decoding.VOCAB, size=100):
        models.assert_same(
            kept(model, _verify(model, starts[0], block(7, token))), expected
        )


@optimised
def test_the_second_row_is_the_next_pass_first(model, starts):
    """Property 4: row 1 of [a, b] is row 0 of b after a.  Of every prompt."""
    rng = np.random.default_rng(1)
    for start in starts:
        for a, b in rng.integers(decoding.VOCAB, size=(10, 2)):
            both = _verify(model, start, block(a, b))
            cache = _verify(model, start, block(a)).cache
            alone = _verify(model, start.replace(cache=cache), block(b))
            same(both.logits[:, 1:], alone.logits)
            same(both.streams[:, 1:], alone.streams)
            models.assert_same_state(both.cache, alone.cache, model.config)
