"""Decoding with drafts made to order, and what two carries are compared by.

Which drafts are right is data, not code: a script tells what is guessed at each
position of a text, so that one compiled program of a mode serves every pattern.  All
texts start from `driver.start` with the default decoding, whose prefill fills the head;
carries of different modes are then compared bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import models
import numpy as np
from flax import struct

from ds4jax.config import ModelConfig
from ds4jax.decode import carry as carries
from ds4jax.decode import cycles, driver, transitions
from ds4jax.decode.carry import MAX_DEPTH, DecodeCarry
from ds4jax.decode.modes import GREEDY, Decoding, Mode
from ds4jax.model.cache import Cache
from ds4jax.model.deepseek import Model

CONTEXT = 256
"""Of every carry: `driver.create` rounds up to it."""
ENDLESS = 2**30
VOCAB = models.micro_config().vocab


@struct.dataclass
class Script:
    """What drafts are, in place of the head's.

    Attributes:
      guesses: int32 [B, CONTEXT + 1 + MAX_DEPTH]: the guess at each position; -1 leaves
        it to the head.
      leads: float32 [B, CONTEXT + 1]: the lead of a cycle's last draft, by the position
        of its first token.
    """

    guesses: np.ndarray
    leads: np.ndarray


def script(
    tokens: Sequence[int] = (),
    wrong: Collection[int] = (),
    leads: float | np.ndarray = 0.0,
) -> Script:
    """Return a script that guesses `tokens`, except at the positions of `wrong`.

    Past the end of `tokens` the head guesses.
    """
    guesses = np.full((1, CONTEXT + 1 + MAX_DEPTH), -1, np.int32)
    guesses[0, : len(tokens)] = tokens
    for position in wrong:
        if position < len(tokens):
            guesses[0, position] = (guesses[0, position] + 1) % VOCAB
    return Script(guesses, np.full((1, CONTEXT + 1), leads, np.float32))


def joined(scripts: Sequence[Script]) -> Script:
    """Return one script of several sequences."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *scripts)


def misses(start: int, counts: Sequence[int], base: int = 0) -> list[int]:
    """Return where to guess wrong, for cycles that verify and keep `counts` tokens.

    A wrong guess at the position where the next cycle starts ends this one there.

    Args:
      start: where the first cycle starts.
      counts: tokens kept of each cycle's verification, at least 1.
      base: tokens of a cycle before its verification: 1 if it is chained, else 0.
    """
    return (start + np.cumsum(np.asarray(counts) + base)).tolist()


def patterns(depth: int, tokens: int) -> list[list[int]]:
    """Return `counts` of `misses`: every number over and over, and at random."""
    rng = np.random.default_rng(depth)
    constant = [[n] * tokens for n in range(1, depth + 2)]
    return [*constant, rng.integers(1, depth + 2, tokens).tolist()]


def counters(counts: Sequence[int], mode: Mode, tokens: int) -> dict:
    """Return the statistics of cycles that keep `counts`, until a budget is spent."""
    passes, decodes, left = 0, 0, tokens
    drafted, accepted = np.zeros((2, MAX_DEPTH), int)
    for count in counts:
        if left and mode.kind == "chained":
            passes, decodes, left = passes + 1, decodes + 1, left - 1
        if not left:
            break
        kept = min(count, left)
        passes += 1
        drafted[: min(mode.depth, left - 1)] += 1
        accepted[: kept - 1] += 1
        left -= kept
    return dict(
        passes=passes, decodes=decodes, boots=0, committed=tokens,
        drafted=drafted, accepted=accepted,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="decoding")
def _cycles(model, carry, script, eos, limit, decoding):
    def draft(model, carry, first, depth, temperature, pairing):
        carry, own, _ = transitions.draft(model, carry, first, depth, temperature)
        at = carry.length[:, None] + 1 + jnp.arange(depth)
        guesses = jnp.take_along_axis(script.guesses, at, axis=1)
        lead = jnp.take_along_axis(script.leads, carry.length[:, None], axis=1)
        return carry, jnp.where(guesses < 0, own, guesses), lead[:, 0]

    return cycles.cycles(model, carry, eos, limit, decoding, draft)


def run(
    model: Model,
    carry: DecodeCarry,
    how: Decoding | Mode = GREEDY,
    told: Script | None = None,
    budget: int | None = None,
    limit: int = ENDLESS,
    eos: int = -1,
) -> DecodeCarry:
    """Run cycles as `driver.run` does, but keep `carry` and draft what is told.

    Args:
      model: the model.
      carry: the state before; any number of sequences.
      how: the way of decoding, or its mode.
      told: what drafts are; the head's own by default.
      budget: as of `carry.with_budget`; what `carry` has left by default.
      limit: cycles at most.
      eos: token that ends a sequence.
    """
    if isinstance(how, Mode):
        how = Decoding(mode=how)
    if budget is not None:
        carry = carries.with_budget(carry, budget)
    if told is None:
        told = script()
        told = jax.tree.map(lambda x: x.repeat(len(carry.done), 0), told)
    return _cycles(model, carry, told, np.int32(eos), np.int32(limit), how)


def ahead(model: Model, carry: DecodeCarry, tokens: int) -> DecodeCarry:
    """Return `carry` moved on by plain decoding."""
    return run(model, carry, budget=tokens) if tokens else carry


def start(
    model: Model, tokens: int, max_tokens: int = CONTEXT, seed: int = 0
) -> DecodeCarry:
    """Return a carry that has read a random text of as many tokens."""
    prompt = models.text(model.config, tokens, seed=seed)[0].tolist()
    return driver.start(model, prompt, min(max_tokens, CONTEXT - tokens))


@jax.jit
def _settle(model, carry):
    first = transitions.first_token(carry)
    return transitions.fill(model, carry, first, jnp.ones_like(carry.done))


def visible(model: Model, carry: DecodeCarry) -> dict:
    """Return all that what follows depends on, of each sequence; the rest is blank.

    The head's rows that still wait are written first: how many wait is the mode's own
    affair.  Every anchor must be valid.
    """
    assert carry.anchor is not None
    rows, length = np.asarray(carry.anchor.rows), np.asarray(carry.length)
    assert (rows > 0).all()
    head = _settle(model, carry).mtp_cache
    np.testing.assert_array_equal(head.length, length)
    tokens = np.asarray(carry.tokens)
    return {
        "length": length,
        "tokens": np.where(np.arange(CONTEXT) < length[:, None], tokens, -1),
        "logits": carry.logits,
        "position": carry.anchor.position,
        "newest": np.asarray(carry.anchor.streams)[np.arange(len(rows)), rows - 1],
        "trunk": models.poison(carry.cache, model.config),
        "head": _head_rows(head, model.config),
    }


def _head_rows(cache: Cache, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the head's rows that the next one sees, and their tags; oldest first."""
    ring, tags = np.asarray(cache.layers[0].raw), np.asarray(cache.layers[0].tags)
    position = np.asarray(cache.length)[:, None] - np.arange(config.window - 1, 0, -1)
    slot = position % ring.shape[1]
    tag = np.take_along_axis(tags, slot, axis=1)
    row = np.take_along_axis(ring, slot[..., None], axis=1)
    known = (position >= 0) & (tag == position)
    return np.where(known[..., None], row, np.nan), np.where(known, tag, -1)


def assert_same_as_plain(model: Model, carry: DecodeCarry, plain: DecodeCarry):
    """Compare all that is visible with plain decoding's state, bit for bit."""
    models.assert_same(visible(model, carry), visible(model, plain))
