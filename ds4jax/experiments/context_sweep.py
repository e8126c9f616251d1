"""Speed against context, measured as ds4-bench does (SPECULATION §5).

One text is read once, up to one frontier after another.  At each of them tokens are
decoded from a copy of the state, in each way that is asked for, and the state goes on:
so a row's reading speed is that of its interval alone, and its tokens are those of a
run that read the text up to there: bit for bit if intervals are whole prefill chunks,
for a prefill pass is outside the row contract.  Copying and compiling are in neither
time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ds4jax.decode import carry as carries
from ds4jax.decode import cycles, driver, replay_drafter
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import Decoding
from ds4jax.decode.replay_drafter import Schedule
from ds4jax.errors import CapacityError, TokenError
from ds4jax.experiments import pass_times
from ds4jax.experiments.timing import Cost
from ds4jax.experiments.unread import unread
from ds4jax.model import cache
from ds4jax.model.deepseek import Model


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of decoding.

    Attributes:
      decoding: everything static about it.
      rate: share of drafts that a replay of plain decoding's text makes right; None
        leaves them to the head.
    """

    decoding: Decoding
    rate: float | None = None


@functools.partial(jax.jit, static_argnames="decoding", donate_argnames="carry")
def _replay(
    model: Model, carry: DecodeCarry, schedule: Schedule, decoding: Decoding
) -> DecodeCarry:
    """Run cycles as `driver.run` does, with the drafts of a schedule."""
    guess = replay_drafter.drafter(schedule)
    endless = jnp.int32(2**30)
    return cycles.cycles(model, carry, jnp.int32(-1), endless, decoding, guess)


@dataclasses.dataclass(frozen=True)
class Point:
    """What was measured of one way at one frontier.

    Attributes:
      way: of decoding.
      context: tokens there when decoding began.
      read: of them, those read since the frontier before; 0 in a state that was not.
      prefill_seconds: that reading these took.
      tokens: the ids decoded.
      decode_seconds: that these took.
      cache_bytes: of the trunk's and the head's live rows at the frontier, see
        `cache.live_nbytes`.
      allocated: tokens that the state has room for, on which the work of a pass depends
        too.
      passes: target passes of decoding.
      decodes: those of them that were a chained cycle's base pass.
      drafted, accepted: drafts verified and committed, at each place of the chain.
      pass_ms, cost: of a replay: a pass of one row, and a cycle in such passes, timed
        apart from the same state.
    """

    way: Way
    context: int
    read: int
    prefill_seconds: float
    tokens: Sequence[int]
    decode_seconds: float
    cache_bytes: int
    allocated: int
    passes: int
    decodes: int
    drafted: Sequence[int]
    accepted: Sequence[int]
    pass_ms: float | None = None
    cost: Cost | None = None


def frontiers(start: int, most: int, increment: int, factor: float) -> list[int]:
    """Return the contexts from `start` to `most`, which is always the last of them.

    As in ds4-bench they are `increment` apart if `factor` is 1; else each is `factor`
    times the one before, rounded up, and at least one token more.
    """
    found = [start]
    while (at := found[-1]) < most:
        step = at + increment if factor == 1 else max(math.ceil(at * factor), at + 1)
        found.append(min(step, most))
    return found


def sweep(
    model: Model,
    prompt: Sequence[int],
    stops: Sequence[int],
    gen_tokens: int,
    ways: Sequence[Way],
    max_context: int,
    seed: int = 0,
    read: bool = True,
) -> Iterator[Point]:
    """Yield what is measured of each way at each frontier, as soon as it is.

    Args:
      model: the model.
      prompt: ids, at least as many as the last frontier.
      stops: the frontiers, rising.
      gen_tokens: decoded at each; no token ends them sooner.
      ways: how, alike but for mode and rate.  What a replay guesses is the text of the
        plain way before it.
      max_context: of the state; it holds the last frontier and what is decoded there.
        The shapes of all passes follow from it.
      seed: of sampling, and of which guesses of a replay are right.
      read: whether the prompt is; else states are `unread`, and it may be empty.

    Raises:
      TokenError: if the prompt is too short, or an id is not in the vocabulary.
      ConfigError: if drafts are asked of a model without a head.
      CapacityError: if the context does not hold a frontier and its tokens.
    """
    driver.check_ids("prompt", prompt, model.config.vocab)
    if read and len(prompt) < stops[-1]:
        raise TokenError(
            f"prompt: expected at least {stops[-1]} tokens, found {len(prompt)}"
        )
    if stops[-1] + gen_tokens > max_context:
        raise CapacityError(
            f"context: expected room for {stops[-1]} + {gen_tokens} tokens, found"
            f" {max_context}"
        )
    # With the state of a head if any way drafts.
    widest = max((way.decoding for way in ways), key=lambda how: how.mode.depth)

    def arrive(carry: DecodeCarry, at: int, stop: int) -> DecodeCarry:
        if not read:
            return unread(carry, stop)
        return driver.prefill(model, carry, prompt[at:stop], widest)

    create = lambda: driver.create(model, max_context, widest, seed)  # noqa: E731
    # All that the timed parts compile or trace, on a carry of the same shapes.
    carry = arrive(create(), 0, 1)
    for way in ways:
        start, schedule = _start(carry, way, 1, carry.tokens, seed)
        jax.block_until_ready(_decode(model, start, way, schedule))
    if read:
        # A GPU that has waited for the compiler reads its first chunk slower.
        chunk = min(stops[0], widest.prefill_chunk)
        jax.block_until_ready(arrive(create(), 0, chunk))
    carry, at = jax.block_until_ready(create()), 0
    for stop in stops:
        carry, prefill = _timed(arrive, carry, at, stop)
        text, costs = carry.tokens, {}
        for way in ways:
            how = way.decoding
            if way.rate is not None and how not in costs:
                costs[how] = pass_times.measure(model, carry, how)
            pass_ms, cost = costs.get(how, (None, None))
            start, schedule = _start(carry, way, gen_tokens, text, seed)
            after, decode = _timed(_decode, model, start, way, schedule)
            if not how.mode.depth:
                text = after.tokens
            counts = after.statistics
            yield Point(
                way=way,
                context=stop,
                read=stop - at if read else 0,
                prefill_seconds=prefill if read else 0.0,
                tokens=driver.committed(after)[stop:],
                decode_seconds=decode,
                cache_bytes=_live_bytes(model, after, stop),
                allocated=after.max_context,
                passes=int(counts.passes[0]),
                decodes=int(counts.decodes[0]),
                drafted=counts.drafted[0].tolist(),
                accepted=counts.accepted[0].tolist(),
                pass_ms=pass_ms,
                cost=cost,
            )
        at = stop


def _start(
    carry: DecodeCarry, way: Way, gen_tokens: int, text: Int[Array, "B context"],
    seed: int,
) -> tuple[DecodeCarry, Schedule | None]:  # fmt: skip
    """Return a copy of a state that may decode so many tokens, and what is replayed."""
    if not way.decoding.mode.depth:
        carry = dataclasses.replace(carry, mtp_cache=None, anchor=None)
    schedule = None
    if way.rate is not None:
        right = replay_drafter.right(way.rate, carry.max_context, seed)
        schedule = Schedule(text, jnp.asarray(right))
    start = carries.with_budget(carries.copy(carry), gen_tokens)
    return jax.block_until_ready((start, schedule))


def _decode(
    model: Model, carry: DecodeCarry, way: Way, schedule: Schedule | None
) -> DecodeCarry:
    if schedule is None:
        return driver.run(model, carry, way.decoding)
    return _replay(model, carry, schedule, decoding=way.decoding)


def _timed(
    step: Callable[..., DecodeCarry], *args: object
) -> tuple[DecodeCarry, float]:
    """Return the carry that a step leaves, once it is there, and the seconds taken."""
    before = time.perf_counter()
    carry = jax.block_until_ready(step(*args))
    return carry, time.perf_counter() - before


def _live_bytes(model: Model, carry: DecodeCarry, length: int) -> int:
    parts = [False] if carry.mtp_cache is None else [False, True]
    return sum(cache.live_nbytes(model.config, length, mtp) for mtp in parts)
