"""The gate: its schedule follows from counters, and it changes no token.

Numbers in docstrings are those of SPECULATION §7.
"""

import dataclasses

import decoding
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from decoding import assert_same_as_plain, misses, run, script
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import anchor

from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.gate import Gate, GateState, judge, rest
from ds4jax.decode.modes import Decoding, Mode
from ds4jax.errors import ConfigError

GATE = Gate(least=0.5, patience=1.5, rest=8, longest=16)
SLEEPY = dataclasses.replace(GATE, warm_up=3)
PROMPT, TOKENS = 37, 100
MODES = [Mode("continuous", 1), Mode("chained", 2)]


@pytest.fixture(scope="module")
def model():
    return models.lively(models.slim_config())


@pytest.fixture(scope="module")
def start(model):
    return decoding.start(model, PROMPT)


@pytest.fixture(scope="module")
def plain(model, start):
    return run(model, start, budget=TOKENS)


def head_layers(carry):
    assert carry.mtp_cache is not None
    return carry.mtp_cache.layers


def schedule(outcomes, gate, cycles):
    """Return which cycles draft, by the rule's words, where drafts go as `outcomes`."""
    drafts, credit, failures, outcomes = [], 0.0, 0, iter(outcomes)
    while len(drafts) < cycles:
        drafts.append(True)
        credit += next(outcomes) - gate.least
        if credit >= gate.patience:
            credit, failures = gate.patience, 0
        if credit <= -gate.patience:
            credit, failures = 0.0, failures + 1
            drafts += [False] * min(gate.rest * 4 ** (failures - 1), gate.longest)
    return drafts[:cycles]


@settings(deadline=None, max_examples=30)  # uncompiled
@given(
    st.lists(st.integers(0, 4), min_size=100, max_size=100),
    st.builds(
        Gate,
        least=st.sampled_from([0.0, 0.5, 1.0, 2.5, 5.0]),
        patience=st.sampled_from([0.25, 0.5, 1.5, 4.0, 10.0]),
        rest=st.integers(1, 4),
        longest=st.integers(4, 40),
    ),
)
def test_the_schedule_is_the_rules(outcomes, gate):
    """Property 34, of any acceptance.  Seen red with `<` in place of `<=`."""
    state, outcome, found = GateState.create(1), iter(outcomes), []
    active = jnp.array([True])
    for _ in range(100):
        found.append(int(state.resting[0]) == 0)
        if found[-1]:
            state = judge(state, gate, jnp.array([next(outcome)]), active)
        else:
            state = rest(state, active)
    assert found == schedule(outcomes, gate, 100)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_wrong_drafts_make_it_rest(model, start, plain, mode):
    """Property 34: on drafts that fail; twice the same, and plain's text and state."""
    how = Decoding(mode=mode, gate=GATE)
    told = script(driver.committed(plain), range(PROMPT, PROMPT + TOKENS + 9))
    carry = run(model, start, how, told, budget=TOKENS)
    assert_same_as_plain(model, carry, plain)
    counts = carry.statistics.of()
    # Three cycles, then 8 plain ones; three more, then 16, ...
    per_cycle = 1 if mode.kind == "continuous" else 2
    drafts, tokens = 0, 0
    for drafting in schedule([0] * TOKENS, GATE, TOKENS):
        drafts += drafting and tokens < TOKENS
        tokens += per_cycle if drafting else 1
    assert counts["drafted"] // mode.depth in (drafts, drafts - 1)
    assert counts["drafted"] < TOKENS / 2
    again = run(model, start, how, told, budget=TOKENS)
    models.assert_same(again.statistics, carry.statistics)
    models.assert_same(again.gate, carry.gate)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_right_drafts_never_make_it_rest(model, start, plain, mode):
    """Property 34: on a text that is guessed, every cycle drafts."""
    told = script(driver.committed(plain))
    gated = run(model, start, Decoding(mode=mode, gate=GATE), told, budget=TOKENS)
    free = run(model, start, mode, told, budget=TOKENS)
    models.assert_same(gated.statistics, free.statistics)
    assert int(gated.gate.resting[0]) == int(gated.gate.failures[0]) == 0


def test_it_drafts_again_when_drafts_become_right(model, start, plain):
    how = Decoding(mode=Mode("continuous", 1), gate=GATE)
    wrong = range(PROMPT, PROMPT + 10)
    carry = run(
        model, start, how, script(driver.committed(plain), wrong), budget=TOKENS
    )
    assert_same_as_plain(model, carry, plain)
    counts = carry.statistics.of()
    assert counts["passes"] - counts["drafted"] in (GATE.rest, GATE.rest + 1)
    assert int(carry.gate.failures[0]) == 0


@pytest.mark.parametrize("gate", [GATE, SLEEPY], ids=["awake", "sleepy"])
def test_cycles_in_pieces_keep_the_schedule(model, start, plain, gate):
    """One cycle a call, as a stream may run; seen red with a state in each call."""
    how = Decoding(mode=Mode("continuous", 1), gate=gate)
    counts = [1, 2, 1, 1, 2] * TOKENS
    told = script(driver.committed(plain), misses(PROMPT, counts))
    whole = run(model, start, how, told, budget=40)
    carry = carries.with_budget(start, 40)
    while bool(carry.active[0]):
        carry = run(model, carry, how, told, limit=1)
    models.assert_same(carry.statistics, whole.statistics)
    models.assert_same(carry.gate, whole.gate)
    models.assert_same(head_layers(carry), head_layers(whole))
    assert 0 < whole.statistics.of()["drafted"] < whole.statistics.of()["passes"] - 1


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_long_rest_leaves_the_head_until_it_warms_up(model, start, plain, mode):
    """All but the head's rows of the sleep is plain's, and no cycle after it is cold.

    Seen red with a sleep that keeps the anchor, and with one that lasts to the end.
    """
    how, tokens = Decoding(mode=mode, gate=SLEEPY), driver.committed(plain)
    told = script(tokens, range(PROMPT, PROMPT + TOKENS + 9))

    def after(cycles):
        return run(model, start, how, told, budget=TOKENS, limit=cycles)

    tired = after(3)
    slept = after(3 + SLEEPY.rest - SLEEPY.warm_up)
    assert anchor(tired).valid[0] and not anchor(slept).valid[0]
    models.assert_same(head_layers(slept)[0].raw, head_layers(tired)[0].raw)

    woken = after(3 + SLEEPY.rest)
    found = decoding.visible(model, woken)
    wanted = decoding.visible(
        model, decoding.ahead(model, start, int(woken.length[0]) - PROMPT)
    )
    (rows, tags), (all_rows, all_tags) = found.pop("head"), wanted.pop("head")
    models.assert_same(found, wanted)
    # Row i needs the token after i, which the newest row before the sleep never saw.
    lost = (all_tags >= tired.length[0] - 1) & (all_tags < slept.length[0])
    assert lost.any()
    np.testing.assert_array_equal(tags, np.where(lost, -1, all_tags))
    np.testing.assert_array_equal(rows, np.where(lost[..., None], np.nan, all_rows))

    done = after(decoding.ENDLESS)
    assert driver.committed(done) == tokens
    assert done.statistics.of()["boots"] == 0


def test_a_sequence_drafts_along_while_another_does(model, start, plain):
    """Its own counters stand still meanwhile, its text is plain's, its anchor there."""
    tokens = driver.committed(plain)
    scripts = [script(tokens), script(tokens, range(PROMPT, PROMPT + TOKENS))]
    told = decoding.joined(scripts)
    how = Decoding(mode=Mode("continuous", 1), gate=SLEEPY)
    both = carries.with_budget(carries.concatenate([start, start]), TOKENS)
    both = run(model, both, how, told, limit=20)
    drafted = np.asarray(both.statistics.drafted).sum(axis=1)
    np.testing.assert_array_equal(drafted, [20, 20])
    np.testing.assert_array_equal(both.gate.resting, [0, SLEEPY.rest])
    assert anchor(both).valid.all()
    done = run(model, both, how, told)
    for i in range(2):
        assert driver.committed(done, i) == tokens
    assert int(done.gate.failures[1]) > 1


def test_a_request_starts_with_drafting(model, start):
    worn = dataclasses.replace(
        start, gate=jax.tree.map(lambda field: field + 7, GateState.create(1))
    )
    fresh = carries.with_budget(worn, 5).gate
    models.assert_same(fresh, GateState.create(1))


@pytest.mark.parametrize(
    "setting, told",
    [
        (dict(least=-0.1), "gate.least: expected at least 0, found -0.1"),
        (dict(patience=0.0), "gate.patience: expected above 0, found 0.0"),
        (dict(rest=0), "gate.rest: expected at least 1, found 0"),
        (dict(longest=9), "gate.longest: expected at least rest=32, found 9"),
        (dict(warm_up=0), "gate.warm_up: expected at least 1, found 0"),
    ],
)
def test_mistakes_are_told(setting, told):
    with pytest.raises(ConfigError, match=f"^{told}$"):
        Gate(**setting)
