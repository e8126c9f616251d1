"""The replay drafter: it knows the text, and errs as often as it is told to.

Random weights accept no draft.  To measure what speculation gains at any acceptance,
the tokens that plain decoding committed from the same state are replayed as guesses,
made wrong where a schedule says so.  The head's passes run as ever, and a wrong guess
is the head's own, so that their cost counts and nothing of them can be left out.
Verification knows nothing of it: the tokens committed are plain decoding's.  Text and
schedule are data, so one compiled program of a mode serves every rate.

Source: DESIGN §6.
"""

from __future__ import annotations

from typing import no_type_check

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from ds4jax.decode import transitions
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.cycles import Drafter

STRATA = 20
"""Cycles over which a rate is kept, as near as whole drafts allow."""


@struct.dataclass
@no_type_check
class Schedule:
    """What is guessed.

    Attributes:
      text: int32 [B, context], the token that plain decoding commits at each position.
      right: bool [cycles, MAX_DEPTH], whether a guess is right, by the drafting cycles
        since `with_budget` and its place in the chain; enough cycles for a run.
    """

    text: Int[Array, "B context"]
    right: Bool[Array, "cycles depth"]


def right(rate: float, cycles: int, seed: int = 0) -> Bool[np.ndarray, "cycles depth"]:
    """Say which guesses are right: each of them, at random, in a share `rate` of cases.

    The guesses of a chain err independently, so one of depth k is right throughout in
    a share `rate**k`.  Draws are stratified: of STRATA cycles one in each equal part of
    0..1, so that few cycles keep to the rate too.  The same seed draws the same numbers
    at every rate: what is right at one rate is right at all above.
    """
    blocks = -(-cycles // STRATA)
    drawn = np.random.default_rng(seed).random((blocks, 2, STRATA, MAX_DEPTH))
    order, within = drawn[:, 0], drawn[:, 1]
    part = order.argsort(axis=1).argsort(axis=1)
    return ((part + within) / STRATA < rate).reshape(-1, MAX_DEPTH)[:cycles]


def drafter(schedule: Schedule) -> Drafter:
    """Return what guesses as the schedule says."""

    def draft(model, carry, first, depth, temperature, pairing):
        carry, own, lead = transitions.draft(
            model, carry, first, depth, temperature, pairing
        )
        place = jnp.arange(depth)
        # Past the room for it nothing is committed, whatever the guess.
        at = jnp.minimum(carry.length[:, None] + 1 + place, carry.max_context - 1)
        known = jnp.take_along_axis(schedule.text, at, axis=1)
        wrong = jnp.where(own == known, (known + 1) % model.config.vocab, own)
        is_right = schedule.right[carry.statistics.drafted[:, 0], :depth]
        return carry, jnp.where(is_right, known, wrong), lead

    return draft
