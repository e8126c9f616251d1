"""The pure steps of which every decode cycle is made: prefill, draft, verify, commit.

Source: the continuous depth-1 cycle of antirez/ds4#371 (SPECULATION §2.6), with three
changes: the head is paired as it was trained, its rows are filled for the prompt, and
they are written again from true trunk streams for every committed token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ds4jax.decode.carry import Anchor, DecodeCarry, Statistics
from ds4jax.model.cache import Cache, scatter
from ds4jax.model.deepseek import DeepSeek, Model
from ds4jax.model.trunk import TrunkOutput

PREFILL_CHUNK = 256
"""Rows of a prefill pass; the last one is filled up and marked with its count."""


def _row(x: Array, index: Int[Array, "B"]) -> Array:
    """Return `x[b, index[b]]` for every b."""
    return jnp.take_along_axis(
        x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1
    ).squeeze(1)


def _set_length(cache: Cache, length: Int[Array, "B"]) -> Cache:
    return dataclasses.replace(cache, length=length)


def prefill_chunk(
    model: Model,
    carry: DecodeCarry,
    chunk: Int[Array, "B T"],
    following: Int[Array, "B"],
    count: Int[Array, "B"],
) -> DecodeCarry:
    """Commit a chunk of a known text, and fill the head's rows for it.

    Args:
      model: the model.
      carry: the state before.
      chunk: the tokens, of which the first `count` are real (at least one).
      following: the token after the chunk's last real one, or -1 at the text's end.
      count: how many.
    """
    modules = model.modules()
    start = carry.length
    out = modules.trunk(chunk, carry.cache, count)
    assert out.cache is not None
    offset = jnp.arange(chunk.shape[1])
    real = offset < count[:, None]
    index = jnp.where(real, start[:, None] + offset, -1)
    carry = dataclasses.replace(
        carry,
        cache=out.cache,
        tokens=scatter(carry.tokens, index, chunk),
        logits=_row(out.logits, count - 1),
    )
    if carry.anchor is None:
        return carry
    carry = _fill_pending(modules, carry, start, chunk[:, 0])
    assert modules.mtp is not None
    assert carry.mtp_cache is not None and carry.anchor is not None
    after = jnp.where(
        offset == count[:, None] - 1,
        following[:, None],
        jnp.roll(chunk, -1, axis=1),
    )
    paired = count - (following < 0)
    head = modules.mtp(
        modules.trunk,
        jnp.maximum(after, 0),
        out.streams,
        _set_length(carry.mtp_cache, start),
        paired,
    )
    newest = _row(out.streams, count - 1)
    streams = carry.anchor.streams.at[:, 0].set(newest)
    rows = (following < 0).astype(jnp.int32)
    return dataclasses.replace(
        carry, mtp_cache=head.cache, anchor=Anchor(streams, rows)
    )


def _pending_tokens(carry: DecodeCarry, end: Array, next_token: Array) -> Array:
    """Return the token after each pending anchor row, [B, W].

    `end` is the length that those rows end at, `next_token` what follows there.
    """
    assert carry.anchor is not None
    width = carry.anchor.streams.shape[1]
    position = (end - carry.anchor.rows + 1)[:, None] + jnp.arange(width)
    known = jnp.take_along_axis(
        carry.tokens, jnp.clip(position, 0, carry.tokens.shape[1] - 1), axis=1
    )
    return jnp.where(position == end[:, None], next_token[:, None], known)


def _run_pending(modules: DeepSeek, carry: DecodeCarry, end: Array, next_token: Array):
    """Run the head on the pending anchor rows, now that what follows is known."""
    assert modules.mtp is not None
    assert carry.anchor is not None and carry.mtp_cache is not None
    return modules.mtp(
        modules.trunk,
        _pending_tokens(carry, end, next_token),
        carry.anchor.streams,
        _set_length(carry.mtp_cache, end - carry.anchor.rows),
        carry.anchor.rows,
    )


def _fill_pending(
    modules: DeepSeek, carry: DecodeCarry, end: Array, next_token: Array
) -> DecodeCarry:
    """Write the head's rows that were waiting for the next token."""
    cache = _run_pending(modules, carry, end, next_token).cache
    return dataclasses.replace(carry, mtp_cache=cache)


def draft(
    model: Model, carry: DecodeCarry, first: Int[Array, "B"], depth: int
) -> tuple[DecodeCarry, Int[Array, "B depth"]]:
    """Guess what follows `first`, from the streams the last target pass left behind.

    Args:
      model: must have a head.
      carry: an anchor of `W > depth` rows; `anchor.rows >= 1`.
      first: the token that the last logits decided, not yet committed.
      depth: tokens to guess; each beyond the first feeds on the head's own streams.

    Returns:
      The carry with the head's rows up to date, and the guesses.
    """
    modules = model.modules()
    assert carry.anchor is not None and modules.mtp is not None
    out = _run_pending(modules, carry, carry.length, first)
    newest = carry.anchor.rows - 1
    streams = _row(out.streams, newest)[:, None]
    token = jnp.argmax(_row(out.logits, newest), axis=-1)
    carry = dataclasses.replace(carry, mtp_cache=out.cache)
    guesses, cache = [token], out.cache
    for _ in range(depth - 1):
        out = modules.mtp(modules.trunk, token[:, None], streams, cache)
        token, streams, cache = jnp.argmax(out.logits[:, 0], -1), out.streams, out.cache
        guesses.append(token)
    # Rows made from the head's own streams stay behind `mtp_cache`'s length: they are
    # written again from the trunk's before a query can see them.
    return carry, jnp.stack(guesses, axis=1).astype(jnp.int32)


def verify(model: Model, carry: DecodeCarry, block: Int[Array, "B W"]) -> TrunkOutput:
    """Run one target pass on `block`, which follows the committed tokens."""
    return model.modules().trunk(block, carry.cache)


def agreement(
    block: Int[Array, "B W"], predicted: Int[Array, "B W"]
) -> Int[Array, "B"]:
    """Return how many of `block`'s rows the target itself would have produced.

    The first is the target's own choice, each further one counts while it equals the
    prediction of the row before.
    """
    same = block[:, 1:] == predicted[:, :-1]
    return 1 + jnp.sum(jnp.cumprod(same, axis=1), axis=1)


def commit(
    carry: DecodeCarry,
    out: TrunkOutput,
    block: Int[Array, "B W"],
    count: Int[Array, "B"],
    eos: Int[Array, ""],
) -> DecodeCarry:
    """Keep the first rows of a verified block: a length, and a choice of rows.

    Args:
      carry: the state that `block` was verified on.
      out: of `verify`.
      block: its tokens.
      count: how many the target agrees with; cut here to the budget, to the room
        left, and at an end-of-sequence token, and to none for an inactive sequence.
      eos: token that ends a sequence, committed itself; -1 for none.
    """
    width = block.shape[1]
    offset = jnp.arange(width)
    ends = jnp.where(block == eos, offset + 1, width + 1).min(axis=1)
    room = carry.tokens.shape[1] - carry.length
    count = jnp.minimum(jnp.minimum(count, ends), jnp.minimum(carry.budget, room))
    count = jnp.where(carry.active, count, 0)
    kept = count > 0
    length = carry.length + count
    index = jnp.where(offset < count[:, None], carry.length[:, None] + offset, -1)
    last = jnp.maximum(count - 1, 0)
    assert out.cache is not None
    anchor = carry.anchor
    if anchor is not None:
        streams = anchor.streams.at[:, :width].set(out.streams)
        anchor = Anchor(
            jnp.where(kept[:, None, None, None], streams, anchor.streams),
            jnp.where(kept, count, anchor.rows),
        )
    old = carry.statistics
    active = carry.active.astype(jnp.int32)
    return dataclasses.replace(
        carry,
        cache=_set_length(out.cache, length),
        tokens=scatter(carry.tokens, index, block),
        logits=jnp.where(kept[:, None], _row(out.logits, last), carry.logits),
        anchor=anchor,
        budget=carry.budget - count,
        done=carry.done | (kept & (ends == count)),
        statistics=Statistics(
            passes=old.passes + active,
            drafted=old.drafted + active * (width - 1),
            accepted=old.accepted + jnp.maximum(count - 1, 0),
            committed=old.committed + count,
        ),
    )


def first_token(carry: DecodeCarry) -> Int[Array, "B"]:
    """Return the token that the last logits decide; ties go to the lowest id."""
    return jnp.argmax(carry.logits, axis=-1).astype(jnp.int32)


def cycle(
    model: Model, carry: DecodeCarry, eos: Int[Array, ""], depth: int
) -> DecodeCarry:
    """Run one greedy cycle: plain at depth 0, else continuous.

    Continuous drafts from the anchor and verifies `[first, d1 .. d_depth]` in one
    target pass: no base decode, and by the row contract exactly plain's tokens.
    """
    first = first_token(carry)
    block = first[:, None]
    if depth:
        carry, guesses = draft(model, carry, first, depth)
        block = jnp.concatenate([block, guesses], axis=1)
    out = verify(model, carry, block)
    predicted = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
    return commit(carry, out, block, agreement(block, predicted), eos)


def cycles(
    model: Model,
    carry: DecodeCarry,
    eos: Int[Array, ""],
    limit: Int[Array, ""],
    depth: int,
) -> DecodeCarry:
    """Run cycles on the device until nothing is active, or `limit` of them."""

    def go_on(state):
        carry, done = state
        return jnp.any(carry.active) & (done < limit)

    def body(state):
        carry, done = state
        return cycle(model, carry, eos, depth), done + 1

    return jax.lax.while_loop(go_on, body, (carry, jnp.int32(0)))[0]
