"""The cycles: each mode's way from one decided token to the next.

Let x be the token that the last logits decide.  Plain runs a target pass on [x].
Chained runs that pass, drafts, and verifies [y, d1 .. dk] in a second one.  Continuous
drafts from the anchor and verifies [x, d1 .. dk] in a single pass: no base decode, and
by the row contract exactly plain's tokens (SPECULATION §2.2, §2.6; DESIGN §4).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ds4jax.decode import gate as gates
from ds4jax.decode.carry import MAX_DEPTH, DecodeCarry
from ds4jax.decode.modes import Decoding
from ds4jax.decode.transitions import (
    agreement,
    allowed,
    choose,
    commit,
    draft,
    drop_anchor,
    fill,
    first_token,
    verify,
)
from ds4jax.model.deepseek import Model
from ds4jax.model.mtp import Pairing

Drafter = Callable[
    [Model, DecodeCarry, Array, int, float, Pairing], tuple[DecodeCarry, Array, Array]
]
"""What guesses, called as `transitions.draft` is, and answering as it does."""


def cycle(
    model: Model,
    carry: DecodeCarry,
    eos: Int[Array, ""],
    decoding: Decoding,
    drafter: Drafter | None = None,
) -> DecodeCarry:
    """Run one cycle of `decoding.mode`; sequences that are not active stay.

    Whether the gate lets them draft is for `cycles` to ask.  Without a drafter the
    head's own guesses are verified, those of `transitions.draft`.
    """
    if not decoding.depth:
        return _plain(model, carry, eos, decoding)
    run = {"chained": _chained, "continuous": _continuous}[decoding.mode.kind]
    guess = drafter or draft
    if decoding.gate is None:
        return run(model, carry, eos, decoding, guess)
    active, before = carry.active, carry.statistics.accepted
    carry = run(model, carry, eos, decoding, guess)
    accepted = (carry.statistics.accepted - before).sum(axis=1)
    state = gates.judge(carry.gate, decoding.gate, accepted, active)
    return dataclasses.replace(carry, gate=state)


def cycles(
    model: Model,
    carry: DecodeCarry,
    eos: Int[Array, ""],
    limit: Int[Array, ""],
    decoding: Decoding,
    drafter: Drafter | None = None,
) -> DecodeCarry:
    """Run cycles on the device until nothing is active, or `limit` of them.

    A sequence that the gate gives a rest goes on drafting as long as another one does:
    its rows in their passes cost nothing.  Where all rest for long, they decode as
    without a head until it has to warm up, see `gate.Gate`.
    """

    def loop(body, condition=lambda carry: True):
        def goes_on(state):
            carry, done = state
            return jnp.any(carry.active) & (done < limit) & condition(carry)

        return lambda state: jax.lax.while_loop(goes_on, body, state)

    def one(run):
        return lambda state: (run(model, state[0], eos, decoding), state[1] + 1)

    state, gate = (carry, jnp.int32(0)), decoding.gate
    run = functools.partial(cycle, drafter=drafter)
    if gate is None or not decoding.depth:
        return loop(one(run))(state)[0]
    # Loops rather than branches of a cycle, which would copy the caches.
    drafts = lambda carry: jnp.any(carry.active & (carry.gate.resting == 0))  # noqa: E731
    sleeps = lambda carry: jnp.all(~carry.active | (carry.gate.resting > gate.warm_up))  # noqa: E731
    drafting = loop(one(run), drafts)
    asleep = loop(one(_resting), sleeps)
    resting = loop(one(_resting), lambda carry: ~drafts(carry) & ~sleeps(carry))

    def sleeping(state):
        carry, done = state
        # The head's state stays behind, so that no cycle has anything to do for it.
        trunk = dataclasses.replace(carry, mtp_cache=None, anchor=None)
        trunk, slept = asleep((trunk, done))
        head = drop_anchor(carry, carry.active & (slept > done))
        both = dataclasses.replace(trunk, mtp_cache=head.mtp_cache, anchor=head.anchor)
        return both, slept

    return loop(lambda state: resting(sleeping(drafting(state))))(state)[0]


def _resting(model, carry, eos, decoding) -> DecodeCarry:
    active = carry.active
    carry = _plain(model, carry, eos, decoding)
    return dataclasses.replace(carry, gate=gates.rest(carry.gate, active))


def _plain(model, carry, eos, decoding) -> DecodeCarry:
    active = carry.active
    first = first_token(carry, decoding.temperature)
    if carry.anchor is not None and decoding.fill:
        carry = _fill_if_full(model, carry, first, decoding)
    block = first[:, None]
    out = verify(model, carry, block)
    carry, _ = commit(carry, out, block, jnp.ones_like(first), eos, decoding)
    return drop_anchor(carry, active) if decoding.policy == "parity" else carry


def _fill_if_full(model, carry, following, decoding) -> DecodeCarry:
    """Write the head's rows that wait once they are as many as a verification leaves.

    So plain decoding seldom pays for a pass of the head; and the anchor keeps space for
    the base pass of a chained cycle.
    """
    anchor = carry.anchor
    assert anchor is not None
    full = carry.active & (anchor.rows == 1 + MAX_DEPTH)

    def write():
        filled = fill(model, carry, following, full, decoding.pairing)
        assert filled.anchor is not None
        return filled.mtp_cache, filled.anchor.rows

    keep = lambda: (carry.mtp_cache, anchor.rows)  # noqa: E731
    mtp_cache, rows = jax.lax.cond(jnp.any(full), write, keep)
    anchor = dataclasses.replace(anchor, rows=rows)
    return dataclasses.replace(carry, mtp_cache=mtp_cache, anchor=anchor)


def _chained(model, carry, eos, decoding, guess) -> DecodeCarry:
    block = first_token(carry, decoding.temperature)[:, None]
    base, out = carry.active, verify(model, carry, block)
    carry, _ = commit(carry, out, block, jnp.ones_like(carry.length), eos, decoding)
    carry = _count(carry, decodes=base)
    return _speculate(model, carry, eos, decoding, guess)


def _continuous(model, carry, eos, decoding, guess) -> DecodeCarry:
    cold = carry.active & ~carry.anchor.valid
    carry = _count(carry, boots=cold)
    return _speculate(model, carry, eos, decoding, guess)


def _speculate(model, carry, eos, decoding, guess) -> DecodeCarry:
    """Draft from the anchor, verify and commit; without an anchor, one token."""
    mode, temperature = decoding.mode, decoding.temperature
    valid, most = carry.anchor.valid, allowed(carry)
    first = first_token(carry, temperature)
    carry, guesses, lead = guess(
        model, carry, first, decoding.depth, temperature, decoding.pairing
    )
    block = jnp.concatenate([first[:, None], guesses], axis=1)
    out = verify(model, carry, block, mode.verifier)
    at = carry.length[:, None] + 1 + jnp.arange(block.shape[1])
    count = agreement(block, choose(out.logits, at, carry.rng, temperature))
    # ds4 then decodes the first token alone: the same, when its rows are independent.
    # A lead is 0 at least, and to find one is to sort the head's logits.
    usable = valid & (lead >= mode.margin) if mode.margin else valid
    carry, count = commit(carry, out, block, jnp.where(usable, count, 1), eos, decoding)
    place = jnp.arange(MAX_DEPTH)
    drafted = place < jnp.minimum(decoding.depth, most - 1)[:, None]
    return _count(
        carry,
        drafted=usable[:, None] & drafted,
        accepted=place < count[:, None] - 1,
    )


def _count(carry: DecodeCarry, **more: Array) -> DecodeCarry:
    """Add to counters, by name."""
    old = carry.statistics
    new = {name: getattr(old, name) + add for name, add in more.items()}
    return dataclasses.replace(carry, statistics=dataclasses.replace(old, **new))
