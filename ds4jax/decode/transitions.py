"""The pure transitions of a carry: prefill, decode, draft, verify, commit and back.

Source: antirez/ds4#371 and the functions of ds4 it builds on (SPECULATION §2, §3). The
differences: taking tokens back is arithmetic on a length, the head is paired as it was
trained, its rows are filled for the prompt, and they are written again from true trunk
streams for every committed token (but those of a gate's long rest, see `gate.Gate`).

For a committed token the head's cache needs its streams *and* the token after it.  The
streams therefore wait in the anchor until that is known; a pass of the head then writes
their rows, and one of the newest makes the next draft.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ds4jax.decode.carry import ANCHOR_ROWS, Anchor, DecodeCarry
from ds4jax.decode.modes import Decoding, Verifier
from ds4jax.model.cache import Cache, forget, row_at, scatter
from ds4jax.model.deepseek import Model
from ds4jax.model.mtp import Pairing
from ds4jax.model.trunk import TrunkOutput


def _set_length(cache: Cache, length: Int[Array, "B"]) -> Cache:
    return dataclasses.replace(cache, length=length)


def choose(
    logits: Float[Array, "B T V"],
    positions: Int[Array, "B T"],
    rng: Key[Array, "B"],
    temperature: float,
) -> Int[Array, "B T"]:
    """Return the token that stands at each position, given the logits before it.

    At temperature 0 it is the best one, ties to the lowest id.  Above, it is a sample
    of `softmax(logits / temperature)`, drawn as the best of logits plus Gumbel noise;
    the noise is a function of sequence and position alone.  So a sampled text does not
    depend on the mode either, and a draft that uses the same noise is often right.
    """
    if temperature:

        def noise(key, at):
            return jax.random.gumbel(jax.random.fold_in(key, at), logits.shape[-1:])

        drawn = jax.vmap(jax.vmap(noise, (None, 0)))(rng, positions)
        logits = logits / temperature + drawn
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def first_token(carry: DecodeCarry, temperature: float = 0.0) -> Int[Array, "B"]:
    """Return the token that the last logits decide, not yet committed."""
    at = carry.length[:, None]
    return choose(carry.logits[:, None], at, carry.rng, temperature)[:, 0]


def prefill(
    model: Model,
    carry: DecodeCarry,
    chunk: Int[Array, "B T"],
    following: Int[Array, "B"],
    count: Int[Array, "B"],
    decoding: Decoding,
) -> DecodeCarry:
    """Commit a chunk of a known text.

    Args:
      model: the model.
      carry: the state before.
      chunk: the tokens, of which the first `count` are real (at least one).
      following: the token after the chunk's last real one, or -1 at the text's end.
      count: how many.
      decoding: static.
    """
    modules = model.modules()
    start = carry.length
    out = modules.trunk(chunk, carry.cache, count, last=True)
    assert out.cache is not None
    offset = jnp.arange(chunk.shape[1])
    real = offset < count[:, None]
    index = jnp.where(real, start[:, None] + offset, -1)
    newest = row_at(out.streams, count - 1)
    if carry.anchor is not None and decoding.fill:
        everyone = jnp.ones_like(carry.done)
        carry = fill(model, carry, chunk[:, 0], everyone, decoding.pairing)
        assert modules.mtp is not None and carry.mtp_cache is not None
        last = offset == count[:, None] - 1
        after = jnp.where(last, following[:, None], jnp.roll(chunk, -1, axis=1))
        head = modules.mtp(
            modules.trunk,
            chunk if decoding.pairing == "ds4" else jnp.maximum(after, 0),
            out.streams,
            _set_length(carry.mtp_cache, start),
            count - (following < 0),
        )
        carry = dataclasses.replace(carry, mtp_cache=head.cache)
    carry = dataclasses.replace(
        carry,
        cache=out.cache,
        tokens=scatter(carry.tokens, index, chunk),
        logits=out.logits[:, 0],
        reach=jnp.maximum(carry.reach, start + count),
    )
    if carry.anchor is None:
        return carry
    # Of a text that goes on the head has the last row as well; at its end h waits.
    waits = (following < 0) if decoding.fill else jnp.ones_like(following, bool)
    anchor = Anchor(
        carry.anchor.streams.at[:, 0].set(newest),
        (waits & (decoding.policy == "warm")).astype(jnp.int32),
        carry.length - 1,
    )
    return dataclasses.replace(carry, anchor=anchor)


def _pending(
    carry: DecodeCarry, following: Int[Array, "B"], pairing: Pairing
) -> tuple[Int[Array, "B W"], Cache]:
    """Return the tokens of the anchor's rows, and the head's cache before them."""
    assert carry.anchor is not None and carry.mtp_cache is not None
    end, rows = carry.length, carry.anchor.rows
    first = end - rows + (pairing == "trained")
    position = first[:, None] + jnp.arange(ANCHOR_ROWS)
    place = jnp.clip(position, 0, carry.max_context - 1)
    known = jnp.take_along_axis(carry.tokens, place, axis=1)
    tokens = jnp.where(position == end[:, None], following[:, None], known)
    return tokens, _set_length(carry.mtp_cache, end - rows)


def fill(
    model: Model,
    carry: DecodeCarry,
    following: Int[Array, "B"],
    which: Bool[Array, "B"],
    pairing: Pairing = "trained",
) -> DecodeCarry:
    """Write the head's rows that wait for `following`, and let go of the anchor.

    Only sequences of `which` let go; the others write those rows again later.
    """
    modules, anchor = model.modules(), carry.anchor
    assert modules.mtp is not None and anchor is not None
    tokens, cache = _pending(carry, following, pairing)
    out = modules.mtp(modules.trunk, tokens, anchor.streams, cache, anchor.rows)
    return _let_go(carry, out.cache, which)


def _let_go(
    carry: DecodeCarry, mtp_cache: Cache | None, which: Bool[Array, "B"]
) -> DecodeCarry:
    assert carry.anchor is not None
    rows = jnp.where(which, 0, carry.anchor.rows)
    return dataclasses.replace(
        carry,
        mtp_cache=mtp_cache,
        anchor=dataclasses.replace(carry.anchor, rows=rows),
    )


def _keep_newest(carry: DecodeCarry) -> DecodeCarry:
    """Let go of all rows but the newest, of which alone it is unknown what follows."""
    anchor = carry.anchor
    assert anchor is not None
    newest = row_at(anchor.streams, jnp.maximum(anchor.rows - 1, 0))
    anchor = dataclasses.replace(
        anchor,
        streams=anchor.streams.at[:, 0].set(newest),
        rows=jnp.minimum(anchor.rows, 1),
    )
    return dataclasses.replace(carry, anchor=anchor)


def draft(
    model: Model,
    carry: DecodeCarry,
    first: Int[Array, "B"],
    depth: int,
    temperature: float = 0.0,
    pairing: Pairing = "trained",
) -> tuple[DecodeCarry, Int[Array, "B depth"], Float[Array, "B"]]:
    """Guess what follows `first`, from the streams the last target pass left behind.

    Args:
      model: must have a head.
      carry: the state; where its anchor is not valid the guesses mean nothing.
      first: the token that the last logits decided, not yet committed.
      depth: tokens to guess; each beyond the first feeds on the head's own streams.
      temperature: as of `choose`.
      pairing: under ds4's the head first guesses `first`, and takes a pass more.

    Returns:
      The carry with the head's rows up to date and, of active sequences, the anchor
      let go; the guesses; and by how much, in logits, the last one leads the head's
      runner-up.
    """
    modules, anchor = model.modules(), carry.anchor
    assert anchor is not None and modules.mtp is not None
    head = functools.partial(modules.mtp, modules.trunk)
    tokens, cache = _pending(carry, first, pairing)
    # Of older rows the cache alone is looked at: no expert of theirs is ever computed.
    older = jnp.maximum(anchor.rows - 1, 0)
    cache = head(tokens[:, :-1], anchor.streams[:, :-1], cache, older).cache
    tokens, streams = (row_at(a, older)[:, None] for a in (tokens, anchor.streams))
    out = head(tokens, streams, cache, jnp.minimum(anchor.rows, 1))
    streams, logits = out.streams, out.logits
    # Rows made from the head's own streams are not kept, see the top of this file.
    carry = _keep_newest(_let_go(carry, out.cache, carry.active))
    guesses, cache, token = [], out.cache, first[:, None]
    for place in range(depth):
        if place or pairing == "ds4":
            out = head(token, streams, cache)
            logits, streams, cache = out.logits, out.streams, out.cache
        at = (carry.length + 1 + place)[:, None]
        token = choose(logits, at, carry.rng, temperature)
        guesses.append(token)
    best = jax.lax.top_k(logits[:, 0], 2)[0]
    return carry, jnp.concatenate(guesses, axis=1), best[:, 0] - best[:, 1]


def verify(
    model: Model,
    carry: DecodeCarry,
    block: Int[Array, "B W"],
    verifier: Verifier = "exact",
) -> TrunkOutput:
    """Run one target pass on `block`, which follows the committed tokens."""
    return model.modules().trunk(block, carry.cache, exact=verifier == "exact")


def agreement(
    block: Int[Array, "B W"], predicted: Int[Array, "B W"]
) -> Int[Array, "B"]:
    """Return how many of `block`'s rows the target itself would have produced.

    The first is the target's own choice, each further one counts while it equals the
    prediction of the row before.
    """
    same = block[:, 1:] == predicted[:, :-1]
    return 1 + jnp.sum(jnp.cumprod(same, axis=1), axis=1)


def _advance(
    carry: DecodeCarry,
    out: TrunkOutput,
    block: Int[Array, "B W"],
    count: Int[Array, "B"],
    decoding: Decoding,
) -> DecodeCarry:
    """Keep the first `count` rows of a pass: a length, and a choice of rows."""
    width = block.shape[1]
    offset = jnp.arange(width)
    is_kept = offset < count[:, None]
    kept, length = count > 0, carry.length + count
    last = jnp.maximum(count - 1, 0)
    anchor = carry.anchor
    if anchor is not None:
        if decoding.fill:
            index = jnp.where(is_kept, anchor.rows[:, None] + offset, -1)
            rows = anchor.rows + count
        else:
            index = jnp.where(offset == count[:, None] - 1, 0, -1)
            rows = jnp.where(kept, 1, anchor.rows)
        streams = scatter(anchor.streams, index, out.streams)
        anchor = Anchor(streams, rows, jnp.where(kept, length - 1, anchor.position))
    assert out.cache is not None
    return dataclasses.replace(
        carry,
        cache=_set_length(out.cache, length),
        tokens=scatter(
            carry.tokens,
            jnp.where(is_kept, carry.length[:, None] + offset, -1),
            block,
        ),
        logits=jnp.where(kept[:, None], row_at(out.logits, last), carry.logits),
        anchor=anchor,
        reach=jnp.maximum(carry.reach, carry.length + width),
    )


def commit(
    carry: DecodeCarry,
    out: TrunkOutput,
    block: Int[Array, "B W"],
    count: Int[Array, "B"],
    eos: Int[Array, ""],
    decoding: Decoding,
) -> tuple[DecodeCarry, Int[Array, "B"]]:
    """Keep the first rows of a verified block, as many as there is leave for.

    Args:
      carry: the state that `block` was verified on.
      out: of `verify`.
      block: its tokens.
      count: how many the target agrees with; cut here to the budget, to the room
        left, and at an end-of-sequence token, and to none for an inactive sequence.
      eos: token that ends a sequence, committed itself; -1 for none.
      decoding: static.

    Returns:
      The carry, its counters of passes and tokens moved on; and how many were kept.
    """
    width = block.shape[1]
    ends = jnp.where(block == eos, jnp.arange(width) + 1, width + 1).min(axis=1)
    count = jnp.minimum(jnp.minimum(count, ends), allowed(carry))
    active, old = carry.active, carry.statistics
    carry = _advance(carry, out, block, count, decoding)
    return dataclasses.replace(
        carry,
        budget=carry.budget - count,
        done=carry.done | (active & (ends == count)),
        statistics=dataclasses.replace(
            old, passes=old.passes + active, committed=old.committed + count
        ),
    ), count


def allowed(carry: DecodeCarry) -> Int[Array, "B"]:
    """Return how many tokens may be committed: budget and room, 0 when inactive."""
    room = carry.max_context - carry.length
    return jnp.where(carry.active, jnp.minimum(carry.budget, room), 0)


def decode(
    model: Model, carry: DecodeCarry, token: Int[Array, "B"], decoding: Decoding
) -> DecodeCarry:
    """Commit one given token of each sequence by a target pass of its own.

    It costs no budget; there must be room.  (ds4: plain eval.)
    """
    everyone = jnp.ones_like(carry.done)
    if carry.anchor is not None and decoding.fill:
        carry = fill(model, carry, token, everyone, decoding.pairing)
    block = token[:, None]
    one = jnp.ones_like(carry.length)
    carry = _advance(carry, verify(model, carry, block), block, one, decoding)
    return drop_anchor(carry, everyone) if decoding.policy == "parity" else carry


def drop_anchor(carry: DecodeCarry, which: Bool[Array, "B"]) -> DecodeCarry:
    """Make the anchor of the sequences of `which` invalid."""
    if carry.anchor is None:
        return carry
    assert carry.mtp_cache is not None
    # The rows that wait may be there, made for a token that need not follow now.
    head = forget(carry.mtp_cache, carry.length - carry.anchor.rows)
    return _let_go(carry, head, which)


def rewind(
    model: Model, carry: DecodeCarry, length: Int[Array, "B"], decoding: Decoding
) -> DecodeCarry:
    """Take back all but the first `length` tokens (at least one) of each sequence.

    A subtraction, and a pass on the last token kept for its logits and its streams.
    Exact while `reach - length` is at most the rings' slack; see `driver.rewind`.
    """
    before, everyone = length - 1, jnp.ones_like(carry.done)
    last = jnp.take_along_axis(carry.tokens, before[:, None], axis=1)[:, 0]
    if carry.anchor is not None:
        if decoding.fill:
            # What follows the newest token is not known; its row is forgotten below.
            carry = fill(model, carry, last, everyone, decoding.pairing)
        assert carry.mtp_cache is not None
        carry = dataclasses.replace(carry, mtp_cache=forget(carry.mtp_cache, before))
        carry = drop_anchor(carry, everyone)
    carry = dataclasses.replace(
        carry, cache=_set_length(carry.cache, before), done=jnp.zeros_like(carry.done)
    )
    return decode(model, carry, last, decoding)


def invalidate(carry: DecodeCarry) -> DecodeCarry:
    """Forget every token, keeping budget, noise and counters."""
    none = jnp.zeros_like(carry.length)
    if carry.anchor is not None:
        assert carry.mtp_cache is not None
        carry = dataclasses.replace(
            carry,
            mtp_cache=forget(carry.mtp_cache, none),
            anchor=dataclasses.replace(carry.anchor, rows=none, position=none - 1),
        )
    return dataclasses.replace(
        carry,
        cache=_set_length(carry.cache, none),
        logits=jnp.zeros_like(carry.logits),
        reach=none,
        done=jnp.zeros_like(carry.done),
    )
