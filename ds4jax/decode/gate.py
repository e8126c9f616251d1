"""The gate: it stops drafting where drafts are not accepted, and tries again later.

It decides by counters alone, never by time, so that a run again has the same schedule;
and the tokens are those of any other run.  (SPECULATION §8: a deterministic bypass.)
"""

from __future__ import annotations

import dataclasses
from typing import no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from ds4jax.errors import expect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """When to stop drafting; static.

    Attributes:
      window: speculative cycles that are judged together; fewer, as soon as those left
        cannot make up for what was not accepted.
      least: drafts accepted per cycle, below which a window does not pay: with passes
        of 1 and of W rows that take R1 and RW, and drafts that take D, speculation is
        faster above (RW + D) / R1 - 1, which is the device's and the model's, and is
        what `ds4jax ablate` reports as the break-even.
      rest: plain cycles after a window that did not pay.  Each further one in a row
        takes four times as many: what tries in vain cost is then soon little, and a
        text of which only the start was hard has not rested long.
      longest: most plain cycles in a row.

    Raises:
      ConfigError: for a value that means nothing.
    """

    window: int = 12
    least: float = 0.3
    rest: int = 32
    longest: int = 1024

    def __post_init__(self):
        for name, holds, expected in (
            ("window", self.window >= 1, "at least 1"),
            ("least", 0 <= self.least, "at least 0"),
            ("rest", self.rest >= 1, "at least 1"),
            ("longest", self.longest >= self.rest, f"at least rest={self.rest}"),
        ):
            expect(f"gate.{name}", holds, expected, getattr(self, name))


@struct.dataclass
@no_type_check
class GateState:
    """Where each sequence is in its schedule, int32 [B].

    Attributes:
      cycles: speculative cycles of this window.
      accepted: drafts that were accepted in it.
      resting: plain cycles left to run; 0 while drafting.
      failures: windows in a row that did not pay.
    """

    cycles: Int[Array, "B"]
    accepted: Int[Array, "B"]
    resting: Int[Array, "B"]
    failures: Int[Array, "B"]

    @classmethod
    def create(cls, batch: int) -> GateState:
        """Return the state of `batch` sequences that draft."""
        return cls(*(jnp.zeros(batch, jnp.int32) for _ in range(4)))


def judge(
    state: GateState,
    gate: Gate,
    accepted: Int[Array, "B"],
    depth: int,
    active: Bool[Array, "B"],
) -> GateState:
    """Return the state after a speculative cycle.

    Args:
      state: before it.
      gate: the rule.
      accepted: drafts that were accepted in the cycle.
      depth: the most that may be.
      active: which sequences took part; those that rest do not count.
    """
    counts = active & (state.resting == 0)
    cycles = state.cycles + counts
    total = state.accepted + jnp.where(counts, accepted, 0)
    possible = total + depth * (gate.window - cycles)
    fails = counts & (possible < gate.least * gate.window)
    ends = fails | (cycles == gate.window)
    failures = jnp.where(ends & ~fails, 0, state.failures + fails)
    most = (gate.longest // gate.rest).bit_length() // 2 + 1
    quadrupled = gate.rest << 2 * jnp.clip(failures - 1, 0, most)
    rest = jnp.minimum(quadrupled, gate.longest)
    return GateState(
        cycles=jnp.where(ends, 0, cycles),
        accepted=jnp.where(ends, 0, total),
        resting=jnp.where(fails, rest, state.resting),
        failures=failures,
    )


def rest(state: GateState, active: Bool[Array, "B"]) -> GateState:
    """Return the state after a plain cycle."""
    left = jnp.maximum(state.resting - active, 0)
    return dataclasses.replace(state, resting=left)
