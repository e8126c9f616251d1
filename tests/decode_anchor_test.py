"""The anchor: what it holds after any transition, and that a wrong one is noticed.

Numbers in docstrings are those of SPECULATION §7.
"""

from __future__ import annotations

import dataclasses
import os.path
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import replay
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from replay import CONFIG, CONTEXT, Replay, anchor, start, text

from ds4jax import assets, gguf
from ds4jax.decode import carry as carries
from ds4jax.decode import cycles, driver, payload, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.gate import Gate
from ds4jax.decode.modes import CONTINUOUS, GREEDY, AnchorPolicy, Decoding, Mode
from ds4jax.errors import CapacityError
from ds4jax.model.deepseek import build
from ds4jax.tokenizer import Tokenizer

WARM, PARITY = CONTINUOUS, dataclasses.replace(CONTINUOUS, policy="parity")
DROWSY = Gate(least=5.0, patience=0.5, rest=4, longest=8, warm_up=1)
"""After each cycle that drafts it rests, mostly without the head."""
TOKEN = st.integers(0, CONFIG.vocab - 1)
BUDGET, EOS = st.integers(1, 9), st.just(-1) | TOKEN
SLIM = models.slim_config()
"""For what is done with anchors, whatever the layers are that made the streams."""
same = np.testing.assert_array_equal
_draft = jax.jit(transitions.draft, static_argnames="depth")


@pytest.fixture(scope="module")
def model():
    return replay.guessing_model(SLIM)


class Transitions(RuleBasedStateMachine):
    """A carry that anything happens to, and the replay of its text."""

    config = SLIM
    policy: AnchorPolicy = "warm"
    gate: Gate | None = None

    def __init__(self):
        super().__init__()
        self.model = replay.guessing_model(self.config)
        self.how = self.decoding(CONTINUOUS.mode)
        self.carry, self.replay = replay.empty(self.config), Replay(self.model)
        self.verified = False

    def decoding(self, mode: Mode) -> Decoding:
        return Decoding(mode=mode, policy=self.policy, gate=self.gate)

    @property
    def length(self) -> int:
        return len(self.replay.tokens)

    @rule(tokens=st.lists(TOKEN, min_size=1, max_size=40))
    def extend(self, tokens):
        if self.length + len(tokens) > CONTEXT:
            with pytest.raises(CapacityError):
                driver.prefill(self.model, self.carry, tokens, self.how)
            return
        self.carry = driver.prefill(self.model, self.carry, tokens, self.how)
        self.replay.prefill(tokens)
        self.verified = False

    @precondition(lambda self: self.length < CONTEXT)
    @rule(token=TOKEN)
    def decode(self, token):
        self.carry = self.after_decode(token)
        self.replay.decode(token)
        self.verified = False

    def after_decode(self, token) -> DecodeCarry:
        return replay.decode(self.model, self.carry, np.array([token]), self.how)

    @precondition(lambda self: self.length < CONTEXT)
    @rule(budget=BUDGET, eos=EOS)
    def run_plain(self, budget, eos):
        self.run(GREEDY.mode, budget, eos)

    @precondition(lambda self: self.length < CONTEXT)
    @rule(budget=BUDGET, eos=EOS)
    def run_chained(self, budget, eos):
        self.run(Mode("chained", 4), budget, eos)

    @precondition(lambda self: self.length < CONTEXT)
    @rule(budget=BUDGET, eos=EOS)
    def run_continuous(self, budget, eos):
        self.run(CONTINUOUS.mode, budget, eos)

    def run(self, mode, budget, eos):
        before, room = self.length, CONTEXT - self.length
        carry = carries.with_budget(self.carry, budget)
        self.carry = driver.run(self.model, carry, self.decoding(mode), eos)
        expected = []
        while len(expected) < min(budget, room) and expected[-1:] != [eos]:
            expected.append(self.replay.best())
            self.replay.decode(expected[-1])
        assert driver.committed(self.carry)[before:] == expected
        self.verified = mode.kind != "plain"

    @precondition(lambda self: self.length)
    @rule(share=st.floats(0, 1))
    def rewind(self, share):
        least = driver.rewind_limit(self.carry)
        length = round(least + share * (self.length - least))
        self.carry = driver.rewind(self.model, self.carry, length, self.how)
        self.replay.rewind(length)
        self.verified = False

    @rule(taken=st.just(0) | st.integers(0, 60), more=st.lists(TOKEN, max_size=6))
    def sync(self, taken, more):
        prompt = self.replay.tokens[: max(self.length - taken, 0)] + more
        if not prompt or len(prompt) >= CONTEXT:
            return
        kept = len(os.path.commonprefix([self.replay.tokens, prompt]))
        within = kept >= driver.rewind_limit(self.carry)
        self.carry, done = driver.sync(self.model, self.carry, prompt, self.how)
        if kept == self.length and kept:
            assert done == ("extended" if len(prompt) > kept else "kept")
        elif kept and within:
            assert done == "rewound"
            self.replay.rewind(kept)
        else:
            assert done == "rebuilt"
            self.replay, kept = Replay(self.model), 0
        if prompt[kept:]:
            self.replay.prefill(prompt[kept:])
        self.verified = False

    @rule()
    def invalidate(self):
        self.carry, self.replay = driver.invalidate(self.carry), Replay(self.model)
        self.verified = False

    @rule()
    def restore(self):
        self.carry = restored(self.model, self.carry, self.how)
        self.verified = False

    @invariant()
    def is_as_replayed(self):
        replay.assert_same_text(self.carry, self.replay.state, self.config)
        replay.assert_anchor(self.carry, self.replay)
        warm = self.policy == "warm"
        gaps = not warm or self.gate is not None
        replay.assert_head_rows(self.carry, self.replay.state, gaps=gaps)
        if self.gate:
            return
        valid = self.length > 0 if warm else self.verified
        assert bool(anchor(self.carry).valid[0]) == valid


def restored(model, carry: DecodeCarry, how: Decoding) -> DecodeCarry:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        payload.save(path, model, carry)
        return payload.restore(path, model, decoding=how)


def check(machine, examples: int, **more):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=16, deadline=None,
            suppress_health_check=[HealthCheck.too_slow], **more,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "config, policy, gate",
    [(CONFIG, "warm", None), (SLIM, "parity", None), (SLIM, "warm", DROWSY)],
    ids=["warm", "parity", "gated"],
)
def test_after_anything_the_anchor_is_a_fresh_replays(config, policy, gate):
    """Property 11, invariant I1: of the newest row and of all that wait with it.

    After every transition the tokens are as a list has them, and logits, the trunk's
    cache and the head's rows are the replay's, bit for bit.  The policy says when there
    is an anchor; a gate's rests may leave none, and gaps.  Seen red with an anchor that
    `decode` leaves as it was, see below, with chained cycles that piled up rows beyond
    ANCHOR_ROWS, and with one that a long rest kept.
    """
    how = {"config": config, "policy": policy, "gate": gate}
    machine = type("Transitions", (Transitions,), how)
    check(machine, examples=12 if gate else 25)


def stale(carry: DecodeCarry, before: DecodeCarry) -> DecodeCarry:
    """Return `carry` with the streams of the anchor before, as if they were new."""
    newest = jnp.maximum(anchor(before).rows - 1, 0)[:, None, None, None]
    old = jnp.take_along_axis(anchor(before).streams, newest, axis=1)
    streams = anchor(carry).streams.at[:, :1].set(old)
    kept = dataclasses.replace(anchor(carry), streams=streams)
    return dataclasses.replace(carry, anchor=kept)


def test_that_test_notices_a_stale_anchor():
    class Forgetful(Transitions):
        def after_decode(self, token):
            return stale(super().after_decode(token), self.carry)

    with pytest.raises(AssertionError, match="not equal"):
        check(Forgetful, examples=25, phases=[Phase.generate], database=None)


def test_the_anchor_never_holds_more_rows_than_fit(model):
    """A budget that ends in a base pass leaves no drafting to write the rows.

    Seen red: rows were added without end, and the newest one fell outside.
    """
    how = Decoding(mode=Mode("chained", 4))
    tokens = text(37)
    again = Replay(model)
    again.prefill(tokens)
    carry = start(model, tokens)
    for budget in [9] + [1] * 10 + [2, 1, 9, 1, 1]:
        carry = driver.run(model, carries.with_budget(carry, budget), how)
        for token in driver.committed(carry)[len(again.tokens) :]:
            assert token == again.best()
            again.decode(token)
        replay.assert_anchor(carry, again)
        replay.assert_head_rows(carry, again.state)


def more_tokens(count: int):
    def sync(model, carry, how):
        prompt = driver.committed(carry) + text(count, seed=count)
        return driver.sync(model, carry, prompt, how)[0]

    return sync


def invalidated(model, carry, how):
    tokens = driver.committed(carry)
    carry = driver.invalidate(carry)
    assert not anchor(carry).valid[0]
    return carries.with_budget(driver.prefill(model, carry, tokens, how), 9)


EVENTS = {
    f"sync of {count} tokens": more_tokens(count) for count in (0, 1, 3, 4, 30)
} | {
    "rewind": lambda model, carry, how: driver.rewind(
        model, carry, int(carry.length[0]) - 5, how
    ),
    "rewind by nothing": lambda model, carry, how: driver.rewind(
        model, carry, int(carry.length[0]), how
    ),
    "invalidate": invalidated,
    "restore": restored,
    "plain eval": lambda model, carry, how: replay.decode(
        model, carry, np.array([7]), how
    ),
    "plain cycle": lambda model, carry, how: driver.run(
        model, carry, dataclasses.replace(how, mode=GREEDY.mode), limit=1
    ),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("how", [WARM, PARITY], ids=["warm", "parity"])
def test_an_event_is_followed_by_a_cold_cycle_in_parity_only(model, how, event):
    """Properties 12 to 16: cold, so one token and a boot; then warm again.

    Seen red with a `drop_anchor` that does nothing.
    """
    carry = driver.run(model, start(model, text(37), how), how, limit=5)
    assert anchor(carry).valid[0]
    carry = EVENTS[event](model, carry, how)
    cold = how.policy == "parity"
    assert bool(anchor(carry).valid[0]) is not cold
    plain = driver.run(model, replay.copy(carries.with_budget(carry, 9)), GREEDY)
    first = driver.run(model, carries.with_budget(carry, 9), how, limit=1)
    counts = first.statistics.of()
    assert (counts["boots"], counts["drafted"]) == ((1, 0) if cold else (0, 1))
    assert counts["passes"] == 1 == counts["committed"] - counts["accepted"]
    assert anchor(first).valid[0]
    rest = driver.run(model, first, how)
    counts = rest.statistics.of()
    assert counts["boots"] == cold
    assert counts["drafted"] >= counts["passes"] - cold - 1
    replay.assert_same_text(rest, plain, SLIM)


def newest(carry: DecodeCarry):
    return np.asarray(anchor(carry).streams)[0, int(anchor(carry).rows[0]) - 1]


def test_warm_decoding_leaves_the_anchor_that_verification_leaves(model):
    """Property 17, and that both draft the same with the same lead.

    Parity lacks the head's row of the prompt's last token; drafts are compared when
    that is out of the head's window.
    """
    verified = start(model, text(37), PARITY)
    evaluated = start(model, text(37))
    for _ in range(40):
        verified = driver.run(model, verified, PARITY, limit=1)
        for token in driver.committed(verified)[int(evaluated.length[0]) :]:
            evaluated = replay.decode(model, evaluated, np.array([token]), WARM)
        assert anchor(verified).valid[0] and anchor(evaluated).valid[0]
        same(newest(evaluated), newest(verified))
        if verified.length[0] >= 37 + CONFIG.window:
            first = transitions.first_token(verified)
            drafts = [_draft(model, c, first, 2)[1:] for c in (evaluated, verified)]
            for found, expected in zip(*drafts, strict=True):
                same(found, expected)
    assert int(verified.statistics.accepted.sum()) > 5


@pytest.mark.parametrize("count", [1, 3, 4, 30])
def test_after_sync_and_a_token_both_policies_have_one_anchor(model, count):
    """Property 17 for sync: only then has parity an anchor again."""
    anchors = []
    for how in (WARM, PARITY):
        carry = driver.run(model, start(model, text(37), how), how, limit=5)
        carry = carries.with_budget(more_tokens(count)(model, carry, how), 1)
        anchors.append(newest(driver.run(model, carry, how)))
    same(*anchors)


SAMPLED = dataclasses.replace(CONTINUOUS, temperature=0.4)
"""For a text that does not go round in circles, in which old streams guess well too."""


@jax.jit
def evaluate_in_turn(model, carry, is_stale):
    """Run plain evaluation and a continuous cycle, 32 times in turn."""

    def both(_, before):
        first = transitions.first_token(before, SAMPLED.temperature)
        carry = transitions.decode(model, before, first, SAMPLED)
        wrong = stale(carry, before)
        carry = jax.tree.map(lambda *x: jnp.where(is_stale, *x), wrong, carry)
        return cycles.cycle(model, carry, jnp.int32(-1), SAMPLED)

    return jax.lax.fori_loop(0, 32, both, carry)


def test_a_stale_anchor_costs_acceptance_but_no_token():
    """Property 18: plain evaluation that bumps the position and forgets the streams.

    Of the shipped model, whose head looks at the streams: it has 30 of 32 drafts right
    with the true ones, and 14 with stale ones.
    """
    config, trunk = gguf.load_trunk(assets.trunk())
    model = build(config, trunk, gguf.load_mtp(assets.mtp(), config))
    tokenizer = Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)
    prompt = tokenizer.encode(
        "The old man sat by the sea. He looked at the boy and said"
    )
    begun = driver.start(model, prompt, 100)
    accepted = []
    for is_stale in (False, True):
        carry = evaluate_in_turn(model, begun, jnp.bool(is_stale))
        counts = carry.statistics.of()
        assert counts["drafted"] == 32
        accepted.append((counts["accepted"], driver.committed(carry)))
    (healthy, tokens), (hurt, others) = accepted
    assert healthy >= 24 and hurt <= healthy - 8
    sampled = dataclasses.replace(GREEDY, temperature=SAMPLED.temperature)
    plain = driver.committed(driver.run(model, begun, sampled))
    assert tokens == plain[: len(tokens)] and others == plain[: len(others)]
