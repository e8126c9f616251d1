"""Speed against context, measured as ds4-bench does (SPECULATION §5).

One text is read once, up to one frontier after another.  At each of them the state is
copied, tokens are decoded from the original, and the copy goes on: so a row's reading
speed is that of its interval alone, and its tokens are those of a run that read the
text up to there: bit for bit if intervals are whole prefill chunks, for a prefill pass
is outside the row contract.  Copying and compiling are in neither time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import Decoding
from ds4jax.errors import CapacityError, TokenError
from ds4jax.model import cache
from ds4jax.model.deepseek import Model


@dataclasses.dataclass(frozen=True)
class Point:
    """What was measured at one frontier.

    Attributes:
      context: tokens read when decoding began.
      read: of them, those since the frontier before.
      prefill_seconds: that reading these took.
      tokens: the ids decoded.
      decode_seconds: that these took.
      cache_bytes: of the trunk's and the head's live rows at the frontier, see
        `cache.live_nbytes`.
      allocated: tokens that the state has room for, on which the work of a pass depends
        too.
      passes: target passes of decoding.
      drafted, accepted: drafts verified and committed, at each place of the chain.
    """

    context: int
    read: int
    prefill_seconds: float
    tokens: Sequence[int]
    decode_seconds: float
    cache_bytes: int
    allocated: int
    passes: int
    drafted: Sequence[int]
    accepted: Sequence[int]


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
    decoding: Decoding,
    max_context: int,
    seed: int = 0,
) -> Iterator[Point]:
    """Yield what is measured at each frontier, as soon as it is.

    Args:
      model: the model.
      prompt: ids, at least as many as the last frontier.
      stops: the frontiers, rising.
      gen_tokens: decoded at each; no token ends them sooner.
      decoding: how.
      max_context: of the state; it holds the last frontier and what is decoded there.
        The shapes of all passes follow from it.
      seed: of sampling.

    Raises:
      TokenError: if the prompt is too short, or an id is not in the vocabulary.
      ConfigError: if drafts are asked of a model without a head.
      CapacityError: if the context does not hold a frontier and its tokens.
    """
    driver.check_ids("prompt", prompt, model.config.vocab)
    if len(prompt) < stops[-1]:
        raise TokenError(
            f"prompt: expected at least {stops[-1]} tokens, found {len(prompt)}"
        )
    if stops[-1] + gen_tokens > max_context:
        raise CapacityError(
            f"context: expected room for {stops[-1]} + {gen_tokens} tokens, found"
            f" {max_context}"
        )
    create = lambda: driver.create(model, max_context, decoding, seed)  # noqa: E731
    # All that the timed parts compile or trace, on a carry of the same shapes.
    carry = driver.prefill(model, create(), prompt[:1], decoding)
    jax.block_until_ready(driver.run(model, carries.with_budget(carry, 1), decoding))
    carry, at = jax.block_until_ready(create()), 0
    for stop in stops:
        carry, prefill = _timed(driver.prefill, model, carry, prompt[at:stop], decoding)
        snapshot = jax.block_until_ready(carries.copy(carry))
        carry = jax.block_until_ready(carries.with_budget(carry, gen_tokens))
        after, decode = _timed(driver.run, model, carry, decoding)
        counts = after.statistics
        yield Point(
            context=stop,
            read=stop - at,
            prefill_seconds=prefill,
            tokens=driver.committed(after)[stop:],
            decode_seconds=decode,
            cache_bytes=_live_bytes(model, snapshot, stop),
            allocated=snapshot.max_context,
            passes=int(counts.passes[0]),
            drafted=counts.drafted[0].tolist(),
            accepted=counts.accepted[0].tolist(),
        )
        carry, at = snapshot, stop


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
