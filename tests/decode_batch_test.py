"""Several sequences in a carry, the batched verifier, counters, and compilations.

Numbers in docstrings are those of SPECULATION §7.
"""

from unittest import mock

import decoding
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import replay
from decoding import (
    ahead,
    counters,
    joined,
    misses,
    patterns,
    run,
    script,
    visible,
)  # fmt: skip

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode

LENGTHS = (37, 5, 70, 20)
TOKENS = 48
CONTINUOUS_2, CHAINED_2 = Mode("continuous", 2), Mode("chained", 2)
same = np.testing.assert_array_equal


@pytest.fixture(scope="module")
def model():
    """Return a model of one layer; `model_rows` has batches of every kind of layer."""
    return replay.guessing_model(models.slim_config())


@pytest.fixture(scope="module")
def starts(model):
    return [decoding.start(model, length, TOKENS) for length in LENGTHS]


@pytest.fixture(scope="module")
def truths(model, starts):
    """Return each prompt and what follows it."""
    return [driver.committed(run(model, start)) for start in starts]


@pytest.mark.parametrize("mode, batch", [(CONTINUOUS_2, 4), (CHAINED_2, 2)])
def test_sequences_together_are_sequences_apart(model, starts, truths, mode, batch):
    """Property 36: whatever is accepted, however each ends, at once or one by one.

    The first meets its end token, the second spends a smaller budget, both while the
    others go on.  Seen red with cycles that let go of the anchors of sequences that
    are not active, and with a budget that all share.
    """
    base = int(mode.kind == "chained")
    scripts = [
        script(truths[0]),
        script(truths[1], misses(LENGTHS[1], [2, 1, 3] * TOKENS, base)),
        script(truths[2], range(len(truths[2]))),
        script(),
    ][:batch]
    before = [carries.with_budget(start, TOKENS) for start in starts[:batch]]
    before[1] = carries.with_budget(before[1], 19)
    eos = truths[0][LENGTHS[0] + 10]
    apart = [
        run(model, carry, mode, told, eos=eos)
        for carry, told in zip(before, scripts, strict=True)
    ]
    together = carries.concatenate(before)
    together = run(model, together, mode, joined(scripts), eos=eos)
    ended = np.asarray(together.done)
    assert ended[0] and not np.asarray(together.active).any()
    assert len({int(carry.statistics.passes[0]) for carry in apart}) == batch
    for i, alone in enumerate(apart):
        found = carries.select(together, i)
        models.assert_same(visible(model, found), visible(model, alone))
        for field in ("budget", "done", "statistics"):
            models.assert_same(getattr(found, field), getattr(alone, field))


def test_counters_of_continuous_cycles_add_up(model, starts, truths):
    """Property 38: cold cycles are those whose anchor was dropped, one each."""
    cycles, cold = 15, np.array([1, 0, 0, 1])
    carry = carries.concatenate(starts)
    carry = transitions.drop_anchor(carry, jnp.asarray(cold, bool))
    told = joined([script(truths[0]), script(truths[1]), script(), script(truths[3])])
    carry = run(model, carry, CONTINUOUS_2, told, budget=TOKENS, limit=cycles)
    counts = jax.tree.map(np.asarray, carry.statistics)
    accepted = counts.accepted.sum(axis=1)
    same(counts.boots, cold)
    same(counts.passes, cycles)
    same(counts.drafted, (cycles - cold)[:, None] * [1, 1, 0, 0])
    same(counts.committed, counts.passes + accepted)
    same(counts.committed, np.asarray(carry.length) - LENGTHS)
    same(counts.decodes, 0)
    same(accepted[[0, 1, 3]], 2 * (cycles - cold[[0, 1, 3]]))
    for i, truth in enumerate(truths):
        found = driver.committed(carry, i)
        assert found == truth[: len(found)]


def test_counters_of_chained_cycles_add_up(model, starts, truths):
    """Property 38: two passes a cycle, one of them a decode of its own."""
    cycles = 9
    carry = carries.concatenate(starts[:2])
    told = joined([script(truths[0]), script(truths[1], range(len(truths[1])))])
    carry = run(model, carry, CHAINED_2, told, budget=TOKENS, limit=cycles)
    counts = carry.statistics
    same(counts.passes, [2 * cycles] * 2)
    same(counts.decodes, [cycles] * 2)
    same(counts.boots, 0)
    same(counts.drafted.sum(axis=1), [2 * cycles] * 2)
    same(counts.accepted.sum(axis=1), [2 * cycles, 0])
    same(counts.committed, counts.passes + counts.accepted.sum(axis=1))
    same(carry.length, np.array(LENGTHS[:2]) + counts.committed)


@pytest.mark.parametrize(
    "config, kind, depth",
    [
        (models.slim_config(), "chained", 1),
        (models.slim_config(), "chained", 4),
        (models.micro_config(), "continuous", 4),
    ],
    ids=["chained-1", "chained-4", "continuous-4"],
)
def test_any_part_of_a_batched_draft_may_be_right(config, kind, depth):
    """Property 32: the batched verifier keeps plain's tokens, whatever it rejects.

    Its passes are another numeric class: float noise of 1e-5 against top-two gaps of
    1e-3 and more.  Seen red with the anchor and logits of the last row after a miss.
    """
    mode, base = Mode(kind, depth, "batched"), int(kind == "chained")
    model = models.lively(config)
    start = decoding.start(model, LENGTHS[0], TOKENS)
    truth = driver.committed(run(model, start))
    carry = run(model, start, mode)
    assert driver.committed(carry) == truth
    for counts in patterns(depth, TOKENS):
        told = script(truth, misses(LENGTHS[0], counts, base))
        carry = run(model, start, mode, told)
        assert driver.committed(carry) == truth
        for counter, expected in counters(counts, mode, TOKENS).items():
            found = getattr(carry.statistics, counter)[0]
            same(found, expected, err_msg=f"{counter} of {counts[:4]}")


BELOW = np.nextafter(np.float32(3), np.float32(0))


@pytest.mark.parametrize(
    "margin, lead, verifies", [(3.0, 3.0, True), (3.0, BELOW, False), (0.0, 0.0, True)]
)
def test_a_margin_gates_a_draft(model, starts, truths, margin, lead, verifies):
    """Property 22: at the threshold a draft is verified, below it one token decoded.

    All drafts are right: the gate alone decides.  Seen red with `>` for `>=`.
    """
    mode, cycles = Mode("chained", 1, "batched", margin), 10
    told = script(truths[0], leads=lead)
    carry = run(model, starts[0], mode, told, budget=TOKENS, limit=cycles)
    counts = carry.statistics.of()
    assert counts["passes"] == 2 * counts["decodes"] == 2 * cycles
    assert counts["drafted"] == counts["accepted"] == verifies * cycles
    assert counts["committed"] == (2 + verifies) * cycles
    length = LENGTHS[0] + counts["committed"]
    assert driver.committed(carry) == truths[0][:length]


def test_a_margin_gates_each_draft_alone(model, starts, truths):
    """Property 22: leads that lie above and below in turn."""
    mode = Mode("chained", 1, "batched", 3.0)
    leads = np.where(np.arange(decoding.CONTEXT + 1) % 2, 5.0, 1.0)
    told = script(truths[0], leads=leads)
    carry = run(model, starts[0], mode, told, budget=TOKENS)
    # A cycle's draft follows its base token: 38 even, 2 tokens; 40 even ... all below.
    assert carry.statistics.of()["accepted"] == 0
    carry = run(model, ahead(model, starts[0], 1), mode, told, budget=TOKENS - 1)
    # 39 odd, 3 tokens; then 42 even, 2 tokens, and even from there on.
    assert carry.statistics.of()["accepted"] == 1


@jax.jit
def _draft(model, carry):
    """Draft two tokens; return the logits of each as well, and the lead."""
    seen, choose = [], transitions.choose

    def record(logits, *rest):
        seen.append(logits[:, 0])
        return choose(logits, *rest)

    first = transitions.first_token(carry)
    with mock.patch.object(transitions, "choose", record):
        _, guesses, lead = transitions.draft(model, carry, first, 2)
    return guesses, seen, lead


def test_a_lead_is_the_last_drafts_over_the_heads_runner_up(model, starts):
    """Property 22: what the margin is compared with, in logits.

    Seen red with the lead of the first draft, and of the last over the third best.
    """
    guesses, logits, lead = _draft(model, carries.concatenate(starts))
    same(np.argmax(logits, axis=-1).T, guesses)
    third, second, best = np.sort(logits[-1])[:, -3:].T
    assert (third < second).all() and (lead > 0).all()
    same(lead, best - second)


def exercise(model, how: Decoding):
    """Do all that a caller does with one carry after the other."""
    for length, tokens, seed in ((1, 30, 0), (37, 8, 1), (150, 60, 2)):
        prompt = models.text(model.config, length, seed=seed)[0].tolist()
        carry = driver.start(model, prompt, tokens, how, seed)
        *_, (carry, _) = driver.stream(model, carry, how, every=7)
        live = driver.committed(carry)
        done = []
        for text in (live, [*live, 3, 4, 5], [*live, 3, 9], [5, 4, 3]):
            carry, what = driver.sync(model, carry, text, how)
            carry = driver.run(model, carries.with_budget(carry, 3), how, 11, seed + 1)
            done.append(what)
        assert done[0] == "kept" and done[-1] == "rebuilt"
        carry = driver.rewind(model, carry, driver.rewind_limit(carry), how)
        driver.run(model, driver.invalidate(carry), how)


@pytest.mark.parametrize("how", [GREEDY, CONTINUOUS], ids=["plain", "continuous"])
def test_each_way_of_decoding_compiles_once(model, how):
    """Neither lengths nor prompts, budgets, limits or what came before matter.

    Seen red with budgets of a weak type.
    """
    programs = {
        name: getattr(driver, name) for name in ("_prefill", "_cycles", "_rewind")
    }
    before = {name: program._cache_size() for name, program in programs.items()}
    exercise(model, how)
    for name, program in programs.items():
        assert program._cache_size() - before[name] <= 1, name
