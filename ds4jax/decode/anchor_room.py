"""How much room the anchor has: for as many rows as may wait, or for fewer in a loop.

The head's pass of older rows takes as many as there is room for, whatever waits.  At
Flash's shape, on an H200, five of them took 80 us of a draft's 360.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ds4jax.decode.carry import ANCHOR_ROWS, DecodeCarry
from ds4jax.decode.transitions import keep_newest, pending
from ds4jax.model.deepseek import Model
from ds4jax.model.mtp import Pairing


def narrow(
    model: Model, carry: DecodeCarry, most: int, room: int, pairing: Pairing
) -> DecodeCarry:
    """Return the carry with room for less in the anchor, until it is `widen`ed.

    Args:
      model: must have a head.
      carry: the state.
      most: where more rows wait, the head's are written for all but the newest.
      room: rows there is room for, `most` or more.
      pairing: of the head.
    """
    modules, before, head = model.modules(), carry.anchor, carry.mtp_cache
    assert modules.mtp is not None and before is not None
    guess = functools.partial(modules.mtp, modules.trunk)
    crowded, streams = before.rows > most, before.streams[:, :-1]

    def write():
        # What follows the newest row, which waits on, is not looked at.
        tokens, cache = pending(carry, jnp.zeros_like(carry.length), pairing)
        older = jnp.where(crowded, before.rows - 1, 0)
        pick = jax.vmap(lambda is_own, own, other: jnp.where(is_own, own, other))
        newest = functools.partial(pick, crowded)
        return (
            guess(tokens[:, :-1], streams, cache, older).cache,
            jax.tree.map(newest, keep_newest(before), before),
        )

    head, anchor = jax.lax.cond(jnp.any(crowded), write, lambda: (head, before))
    anchor = dataclasses.replace(anchor, streams=anchor.streams[:, :room])
    return dataclasses.replace(carry, mtp_cache=head, anchor=anchor)


def widen(carry: DecodeCarry) -> DecodeCarry:
    """Return the carry with room for ANCHOR_ROWS in the anchor."""
    anchor = carry.anchor
    assert anchor is not None
    more = ANCHOR_ROWS - anchor.streams.shape[1]
    streams = jnp.pad(anchor.streams, ((0, 0), (0, more), (0, 0), (0, 0)))
    anchor = dataclasses.replace(anchor, streams=streams)
    return dataclasses.replace(carry, anchor=anchor)
