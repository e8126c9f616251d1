"""What passes take, one after the other on the device: the cost model's r and d."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import Decoding
from ds4jax.experiments import arm_runs
from ds4jax.experiments.timing import Cost
from ds4jax.model.deepseek import Model

REPEATS = 20
"""Passes timed together."""
ROUNDS = 5


def milliseconds(run: Callable[[int], Any], rounds: int = ROUNDS) -> list[float]:
    """Return what one of the passes of `run(n)` takes, rising, of so many rounds.

    Neither compiling is in that nor what a call takes by itself: 9 ms, where it has two
    thousand weights for operands.
    """

    def seconds(passes: int) -> float:
        before = time.perf_counter()
        jax.block_until_ready(run(passes))
        return time.perf_counter() - before

    seconds(1)
    return sorted(
        1e3 * (seconds(1 + REPEATS) - seconds(1)) / REPEATS for _ in range(rounds)
    )


def measure(model: Model, carry: DecodeCarry, decoding: Decoding) -> tuple[float, Cost]:
    """Return what a pass of one row takes, in milliseconds, and a cycle in such passes.

    Args:
      model: the model.
      carry: where the passes start; kept.
      decoding: how, with drafts.
    """

    def target(width: int) -> float:
        exact = decoding.mode.verifier == "exact" or width == 1
        return statistics.median(
            milliseconds(
                lambda n: arm_runs.target_passes(
                    model, carry.cache, jnp.int32(n), width, exact
                )
            )
        )

    one, verification = target(1), target(1 + decoding.depth)
    drafts = statistics.median(
        milliseconds(
            lambda n: arm_runs.drafts(
                model, carry, jnp.int32(n), decoding.depth, decoding.pairing
            )
        )
    )
    base = 2.0 if decoding.mode.kind == "chained" else 1.0
    return one, Cost(verification / one + base - 1, drafts / one, base)
