"""Runs of an arm: timed, counted, and judged by the oracle.

All arms of a text start from the same state of the trunk, made by one prefill.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, oracles
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding
from ds4jax.decode.transitions import commit, draft, first_token, verify
from ds4jax.experiments.arms import ONE_ROW, Arm, Settings
from ds4jax.experiments.runs_csv import Run
from ds4jax.model.cache import Cache
from ds4jax.model.deepseek import Model
from ds4jax.model.mtp import Pairing

Passage = tuple[str, int]
"""A text and a seed."""


@functools.partial(jax.jit, static_argnames="decoding", donate_argnames="carry")
def decode_one_row(
    model: Model, carry: DecodeCarry, limit: Int[Array, ""], decoding: Decoding
):
    """Decode plainly by passes of one row, to the end of the budget or `limit` of them.

    They are outside the row contract, like a batched verification.
    """

    def step(state):
        carry, done = state
        block = first_token(carry, decoding.temperature)[:, None]
        out = verify(model, carry, block, "batched")
        one = jnp.ones_like(carry.length)
        carry, _ = commit(carry, out, block, one, jnp.int32(-1), decoding)
        return carry, done + 1

    def goes_on(state):
        carry, done = state
        return jnp.any(carry.active) & (done < limit)

    return jax.lax.while_loop(goes_on, step, (carry, jnp.int32(0)))[0]


@functools.partial(jax.jit, static_argnames=("width", "exact"))
def target_passes(
    model: Model, cache: Cache, repeats: Int[Array, ""], width: int, exact: bool
):
    """Run target passes of `width` different tokens, each fed by the one before."""

    def step(_, state):
        token, cache = state
        block = (token + jnp.arange(width)) % model.config.vocab
        out = model.modules().trunk(block[None], cache, exact=exact)
        assert out.cache is not None
        after = dataclasses.replace(out.cache, length=cache.length)
        return jnp.argmax(out.logits[0, 0]).astype(jnp.int32), after

    return jax.lax.fori_loop(0, repeats, step, (jnp.int32(0), cache))


@functools.partial(jax.jit, static_argnames=("depth", "pairing"))
def drafts(
    model: Model, carry: DecodeCarry, repeats: Int[Array, ""], depth: int,
    pairing: Pairing,
):  # fmt: skip
    """Draft from one anchor, each chain fed by the one before."""

    def step(_, state):
        first, head = state
        now = dataclasses.replace(carry, mtp_cache=head)
        after, guesses, _ = draft(model, now, first, depth, 0.0, pairing)
        return guesses[:, -1], after.mtp_cache

    return jax.lax.fori_loop(0, repeats, step, (carry.tokens[:, 0], carry.mtp_cache))


class Bench:
    """A model, ready to run arms.

    Attributes:
      model: the model.
      settings: of the ablation.
      prompts: the ids that each passage continues.
      context: tokens a state has room for, the same for all.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        prompts: Mapping[Passage, Sequence[int]],
    ):
        self.model, self.settings, self.prompts = model, settings, prompts
        self.context = settings.tokens + max(map(len, prompts.values()))
        self._starts: dict[tuple, DecodeCarry] = {}
        self._gaps: dict[tuple, tuple[float, float]] = {}

    def warm(self, arm: Arm, passage: Passage):
        """Compile all that a run of the arm needs."""
        start = self._start(arm, passage)
        jax.block_until_ready(self._decode(arm, carries.with_budget(start, 2)))
        self._cycle_ms(arm, passage, 1)

    def run(
        self, arms: Sequence[Arm], passage: Passage, number: int
    ) -> list[dict[str, Any]]:
        """Return what a run of each arm says, by column, but for where it was made.

        They take turns: the next is that of the arm which is behind all others.

        Args:
          arms: the ways of decoding.
          passage: what to continue.
          number: of the round.
        """
        budget = self.settings.tokens
        states = {
            arm: carries.with_budget(self._start(arm, passage), budget) for arm in arms
        }
        turns: dict[Arm, list[float]] = {arm: [] for arm in arms}

        def committed(arm: Arm) -> int:
            return int(states[arm].length[0])

        while active := [arm for arm in arms if states[arm].active[0]]:
            arm = min(active, key=committed)
            state = jax.block_until_ready(states[arm])
            before = time.perf_counter()
            states[arm] = jax.block_until_ready(self._decode(arm, state))
            turns[arm].append(time.perf_counter() - before)
        return [
            self._words(arm, passage, number, states[arm], turns[arm]) for arm in arms
        ]

    def _words(
        self, arm: Arm, passage: Passage, number: int, carry: DecodeCarry,
        turns: Sequence[float],
    ) -> dict[str, Any]:  # fmt: skip
        """Return what a run says, whose turns took so long and left `carry`."""
        seconds = sum(turns)
        target_ms, draft_ms = self._cycle_ms(arm, passage, self.settings.repeats)
        counts = carry.statistics.of()
        found = driver.committed(carry)
        sha256 = driver.digest(found[len(self.prompts[passage]) :])
        worst, diverged = self._judge(passage, found, sha256)
        place = {
            f"{name}_{i + 1}": int(count)
            for name in ("drafted", "accepted")
            for i, count in enumerate(getattr(carry.statistics, name)[0])
        }
        return dict(
            arm=arm.name, text=passage[0], seed=passage[1], round=number,
            **dataclasses.asdict(arm),
            tokens=counts["committed"], seconds=seconds, turns=tuple(turns),
            tokens_per_second=counts["committed"] / seconds,
            passes=counts["passes"],
            shared_reads_per_token=counts["passes"] / counts["committed"],
            decodes=counts["decodes"], cold_cycles=counts["boots"], **place,
            target_ms=target_ms, draft_ms=draft_ms,
            sha256=sha256, worst_gap=worst, diverged=diverged,
        )  # fmt: skip

    def remember(self, run: Run):
        """Take the oracle's words for a stream from an earlier run of it."""
        gaps = run.worst_gap, run.diverged
        self._gaps[(run.text, run.seed), run.sha256] = gaps

    def _start(self, arm: Arm, passage: Passage) -> DecodeCarry:
        """Return a copy of the state that runs of the arm start from."""
        key = passage, arm.fill, arm.pairing
        if key not in self._starts:
            # One compiled program for all arms whose heads' caches are alike.
            pairing: Any = arm.pairing
            how = dataclasses.replace(CONTINUOUS, fill=arm.fill, pairing=pairing)
            carry = driver.create(self.model, self.context, how, passage[1])
            prompt = self.prompts[passage]
            self._starts[key] = driver.prefill(self.model, carry, prompt, how)
        carry = self._starts[key]
        if not arm.depth:
            carry = dataclasses.replace(carry, mtp_cache=None, anchor=None)
        return jax.tree.map(jnp.copy, carry)

    def _decode(self, arm: Arm, carry: DecodeCarry) -> DecodeCarry:
        """Decode for a turn."""
        decoding, turn = arm.decoding(self.settings), self.settings.turn
        if arm == ONE_ROW:
            return decode_one_row(self.model, carry, jnp.int32(turn), decoding)
        return driver.run(self.model, carry, decoding, limit=turn)

    def _cycle_ms(
        self, arm: Arm, passage: Passage, repeats: int
    ) -> tuple[float, float]:
        """Return the milliseconds of a cycle's target passes, and of its drafts."""

        carry = jax.block_until_ready(self._start(arm, passage))

        def ms(passes, state, *static):
            times = jnp.int32(repeats)
            before = time.perf_counter()
            jax.block_until_ready(passes(self.model, state, times, *static))
            return 1e3 * (time.perf_counter() - before) / repeats

        target = ms(target_passes, carry.cache, 1 + arm.depth, arm.verifier == "exact")
        if arm.mode == "chained":
            target += ms(target_passes, carry.cache, 1, True)
        pairing: Any = arm.pairing
        draft_ms = ms(drafts, carry, arm.depth, pairing) if arm.depth else 0.0
        return target, draft_ms

    def _judge(
        self, passage: Passage, tokens: list[int], sha256: str
    ) -> tuple[float, float]:
        """Return the worst argmax gap of a stream and how often it diverges."""
        if self.settings.temperature:
            return np.nan, np.nan
        key = passage, sha256
        if key not in self._gaps:
            prompt = len(self.prompts[passage])
            gaps = oracles.argmax_gaps(
                self.model, tokens, prompt, GREEDY, self.context
            )  # fmt: skip
            rate = oracles.Divergence.of(gaps).rate
            self._gaps[key] = float(gaps.max()), rate
        return self._gaps[key]
