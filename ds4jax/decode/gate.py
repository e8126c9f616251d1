"""The gate: it stops drafting where drafts are not accepted, and tries again later.

It decides by counters alone, never by time, so that a run again has the same schedule;
and the tokens are those of any other run.  (SPECULATION §8: a deterministic bypass.)
"""

from __future__ import annotations

import dataclasses
from typing import no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ds4jax.errors import expect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """When to stop drafting; static.

    A sum is kept, from 0, of what each speculative cycle accepts above or below
    `least`.  At `-patience` drafting has not paid and rests; at `patience` it has, and
    the sum stays there.  (Two-sided as Wald's sequential test, then one-sided as Page's
    cumulative sum: Biometrika 41, 1954.)

    Attributes:
      least: drafts accepted per cycle, below which speculation does not pay: with
        passes of 1 and of W rows that take R1 and RW, and drafts that take D, it is
        faster above (RW + D) / R1 - 1, which is the device's and the model's, and is
        what `ds4jax ablate` reports as the break-even.
      patience: drafts that may be missing.
      rest: plain cycles after drafting that did not pay.  Each further time in a row
        takes four times as many: what tries in vain cost is then soon little, and a
        text of which only the start was hard has not rested long.
      longest: most plain cycles in a row.
      warm_up: the last of them, in which the head's cache is filled again, so that the
        next draft sees these rows.  Of those before there are none, and the anchor is
        not valid: to have them costs a few percent of a pass, of which a rest is long.

    Raises:
      ConfigError: for a value that means nothing.
    """

    least: float = 0.3
    patience: float = 1.5
    rest: int = 32
    longest: int = 1024
    warm_up: int = 32

    def __post_init__(self):
        for name, holds, expected in (
            ("least", 0 <= self.least, "at least 0"),
            ("patience", self.patience > 0, "above 0"),
            ("rest", self.rest >= 1, "at least 1"),
            ("longest", self.longest >= self.rest, f"at least rest={self.rest}"),
            ("warm_up", self.warm_up >= 1, "at least 1"),
        ):
            expect(f"gate.{name}", holds, expected, getattr(self, name))


@struct.dataclass
@no_type_check
class GateState:
    """Where each sequence is in its schedule.

    Attributes:
      credit: float32 [B], drafts accepted above `least` of each cycle, or below.
      resting: int32 [B], plain cycles left to run; 0 while drafting.
      failures: int32 [B], times in a row that drafting did not pay.
    """

    credit: Float[Array, "B"]
    resting: Int[Array, "B"]
    failures: Int[Array, "B"]

    @classmethod
    def create(cls, batch: int) -> GateState:
        """Return the state of `batch` sequences that draft."""
        # Each with memory of its own, which a carry gives away.
        kinds = jnp.float32, jnp.int32, jnp.int32
        return cls(*(jnp.zeros(batch, kind) for kind in kinds))


def judge(
    state: GateState,
    gate: Gate,
    accepted: Int[Array, "B"],
    active: Bool[Array, "B"],
) -> GateState:
    """Return the state after a speculative cycle.

    Args:
      state: before it.
      gate: the rule.
      accepted: drafts that were accepted in the cycle.
      active: which sequences took part; those that rest do not count.
    """
    counts = active & (state.resting == 0)
    credit = jnp.minimum(state.credit + accepted - gate.least, gate.patience)
    credit = jnp.where(counts, credit, state.credit)
    fails = counts & (credit <= -gate.patience)
    failures = jnp.where(credit == gate.patience, 0, state.failures + fails)
    most = (gate.longest // gate.rest).bit_length() // 2 + 1
    quadrupled = gate.rest << 2 * jnp.clip(failures - 1, 0, most)
    rest = jnp.minimum(quadrupled, gate.longest)
    return GateState(
        credit=jnp.where(fails, 0.0, credit),
        resting=jnp.where(fails, rest, state.resting),
        failures=failures,
    )


def rest(state: GateState, active: Bool[Array, "B"]) -> GateState:
    """Return the state after a plain cycle."""
    left = jnp.maximum(state.resting - active, 0)
    return dataclasses.replace(state, resting=left)
