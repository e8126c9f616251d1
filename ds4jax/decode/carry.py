"""Everything that changes while decoding, as one pytree.

A transition takes a carry and returns a carry; nothing else remembers anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from ds4jax.config import ModelConfig
from ds4jax.decode.gate import GateState
from ds4jax.errors import ConfigError
from ds4jax.model import cache as model_cache
from ds4jax.model.cache import DECODE_ROWS, Cache

MAX_DEPTH = 4
"""Deepest draft: a verification of `1 + depth` rows must fit a decode pass."""

ANCHOR_ROWS = 2 + MAX_DEPTH
"""Rows an anchor can hold: a verification's, and the base pass of a chained cycle."""

assert ANCHOR_ROWS <= DECODE_ROWS


@struct.dataclass
@no_type_check
class Anchor:
    """Where drafting continues: what the last target passes left behind.

    Attributes:
      streams: float32 [B, ANCHOR_ROWS, M, D]: the trunk's streams of the newest
        committed tokens, oldest first.  Only the first `rows` mean anything; the last
        of them is the anchor proper, h of the token at `position`.
      rows: int32 [B]: how many wait for the token that follows them, and so for their
        row of the MTP cache.  0: there is no anchor, and the next cycle is cold.
      position: int32 [B]: of the newest row; `length - 1` whenever `rows > 0`.
    """

    streams: Float[Array, "B W M D"]
    rows: Int[Array, "B"]
    position: Int[Array, "B"]

    @property
    def valid(self) -> Bool[Array, "B"]:
        """Say which sequences can draft."""
        return self.rows > 0


@struct.dataclass
@no_type_check
class Statistics:
    """Counters of a run, int32.

    Attributes:
      passes: [B] target passes; each reads the shared weights once, whatever its rows.
      decodes: [B] those of them that were a chained cycle's base pass.
      boots: [B] continuous cycles that were cold, for want of an anchor.
      committed: [B] tokens committed by decoding (not by prefill).
      drafted: [B, MAX_DEPTH] drafts verified, by their place in the chain.
      accepted: [B, MAX_DEPTH] drafts committed.
    """

    passes: Int[Array, "B"]
    decodes: Int[Array, "B"]
    boots: Int[Array, "B"]
    committed: Int[Array, "B"]
    drafted: Int[Array, "B depth"]
    accepted: Int[Array, "B depth"]

    def of(self, sequence: int = 0) -> dict[str, int]:
        """Return the counters of one sequence, by name; drafts of any place."""
        return {name: int(count[sequence].sum()) for name, count in vars(self).items()}

    def acceptance(self, sequence: int = 0) -> list[float]:
        """Return the share accepted of the drafts at each place; 0 where none was."""
        drafted = jnp.maximum(self.drafted[sequence], 1)
        return (self.accepted[sequence] / drafted).tolist()


@struct.dataclass
@no_type_check
class DecodeCarry:
    """The state of B sequences.

    Attributes:
      cache: the trunk's; `cache.length` is the number of committed tokens.
      mtp_cache: the MTP head's, row i made of (h_i, t_{i+1}), each slot tagged with
        the row it holds; None without a head.
      tokens: int32 [B, max_context]: the committed tokens, then garbage.
      logits: float32 [B, V] after the newest committed token.
      anchor: see Anchor; None without a head.
      reach: int32 [B]: rings hold rows of positions below it, rejected ones too; how
        far a rewind can go follows from it.
      budget: int32 [B]: tokens that may still be committed.
      done: bool [B]: an end-of-sequence token was committed.
      rng: key [B]: the noise of position p is drawn from `fold_in(rng, p)`.
      gate: when to draft; see GateState.
      statistics: see Statistics.
    """

    cache: Cache
    mtp_cache: Cache | None
    tokens: Int[Array, "B context"]
    logits: Float[Array, "B V"]
    anchor: Anchor | None
    reach: Int[Array, "B"]
    budget: Int[Array, "B"]
    done: Bool[Array, "B"]
    rng: Key[Array, "B"]
    gate: GateState
    statistics: Statistics

    @property
    def length(self) -> Int[Array, "B"]:
        """Return the number of committed tokens of each sequence."""
        return self.cache.length

    @property
    def max_context(self) -> int:
        """Return the most tokens a sequence may hold."""
        return self.tokens.shape[1]

    @property
    def active(self) -> Bool[Array, "B"]:
        """Say which sequences go on: not ended, and with budget and room left."""
        return ~self.done & (self.budget > 0) & (self.length < self.max_context)


def create(
    config: ModelConfig,
    max_context: int,
    *,
    mtp: bool,
    batch: int = 1,
    seed: int = 0,
) -> DecodeCarry:
    """Return a carry that holds no token.

    Args:
      config: the model's.
      max_context: most tokens a sequence may hold.
      mtp: whether to keep the state of an MTP head, without which nothing drafts.
      batch: B.
      seed: of `rng`; sequence b gets `fold_in(key(seed), b)`.
    """
    # A buffer of its own for each field: a donated carry may not share any.
    zeros = lambda *more: jnp.zeros((batch, *more), jnp.int32)  # noqa: E731
    head, anchor = None, None
    if mtp:
        head = model_cache.empty(config, max_context, batch, ratios=(0,), tagged=True)
        shape = (batch, ANCHOR_ROWS, config.hc_streams, config.hidden)
        anchor = Anchor(jnp.zeros(shape), zeros(), zeros() - 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(batch)
    )
    return DecodeCarry(
        cache=model_cache.empty(config, max_context, batch),
        mtp_cache=head,
        tokens=zeros(max_context),
        logits=jnp.zeros((batch, config.vocab)),
        anchor=anchor,
        reach=zeros(),
        budget=zeros(),
        done=jnp.zeros(batch, bool),
        rng=keys,
        gate=GateState.create(batch),
        statistics=Statistics(
            zeros(), zeros(), zeros(), zeros(), zeros(MAX_DEPTH), zeros(MAX_DEPTH)
        ),
    )


def concatenate(carries: Sequence[DecodeCarry]) -> DecodeCarry:
    """Return one carry of all sequences, which must be of one model and context."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *carries)


def select(carry: DecodeCarry, sequence: int) -> DecodeCarry:
    """Return the carry of one sequence alone, B = 1."""
    return jax.tree.map(lambda x: x[sequence : sequence + 1], carry)


def copy(carry: DecodeCarry) -> DecodeCarry:
    """Return an equal carry in buffers of its own: a snapshot.

    What jit donates is gone; a copy made before outlives it, and to go on from the copy
    repeats every bit.
    """
    return jax.tree.map(jnp.copy, carry)


def with_budget(carry: DecodeCarry, tokens: int) -> DecodeCarry:
    """Return `carry` with leave to commit `tokens` more, counters and gate anew.

    Raises:
      ConfigError: if `tokens` is negative.
    """
    if tokens < 0:
        raise ConfigError(f"max_tokens: expected at least 0, found {tokens}")
    return dataclasses.replace(
        carry,
        budget=jnp.full_like(carry.budget, tokens),
        done=jnp.zeros_like(carry.done),
        gate=jax.tree.map(jnp.zeros_like, carry.gate),
        statistics=jax.tree.map(jnp.zeros_like, carry.statistics),
    )
