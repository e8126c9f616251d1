"""Everything that changes while decoding, as one pytree.

A transition takes a carry and returns a carry; nothing else remembers anything.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.model import cache as model_cache
from ds4jax.model.cache import DECODE_ROWS, Cache

MAX_DEPTH = 4
"""Deepest draft: a verification of `1 + depth` rows must fit a decode pass."""

assert MAX_DEPTH < DECODE_ROWS


@struct.dataclass
class Anchor:
    """Where drafting continues: what the last target pass left behind.

    Attributes:
      streams: float32 [B, W, M, D]: the trunk's streams of the tokens that pass
        committed, oldest first; only the first `rows` mean anything, the last of
        which is the anchor proper, h of the newest committed token.
      rows: int32 [B]: how many.  Their MTP rows are written by the next draft, when
        the token that follows each of them is known.
    """

    streams: Float[Array, "B W M D"]
    rows: Int[Array, "B"]


@struct.dataclass
class Statistics:
    """Counters of a run, int32 [B] each.

    Attributes:
      passes: target passes; each reads the shared weights once, whatever its rows.
      drafted: draft tokens that were verified.
      accepted: draft tokens that were committed.
      committed: tokens committed by decoding (not by prefill).
    """

    passes: Int[Array, "B"]
    drafted: Int[Array, "B"]
    accepted: Int[Array, "B"]
    committed: Int[Array, "B"]

    def of(self, sequence: int = 0) -> dict[str, int]:
        """Return the counters of one sequence, by name."""
        return {name: int(count[sequence]) for name, count in vars(self).items()}


@struct.dataclass
class DecodeCarry:
    """The state of B sequences.

    Attributes:
      cache: the trunk's; `cache.length` is the number of committed tokens.
      mtp_cache: the MTP head's, row i made of (h_i, t_{i+1}); None without a head.
      tokens: int32 [B, max_context]: the committed tokens, then garbage.
      logits: float32 [B, V] after the newest committed token.
      anchor: see Anchor; None without a head.
      budget: int32 [B]: tokens that may still be committed.
      done: bool [B]: an end-of-sequence token was committed.
      statistics: see Statistics.
    """

    cache: Cache
    mtp_cache: Cache | None
    tokens: Int[Array, "B context"]
    logits: Float[Array, "B V"]
    anchor: Anchor | None
    budget: Int[Array, "B"]
    done: Bool[Array, "B"]
    statistics: Statistics

    @property
    def length(self) -> Int[Array, "B"]:
        """Return the number of committed tokens of each sequence."""
        return self.cache.length

    @property
    def active(self) -> Bool[Array, "B"]:
        """Say which sequences go on: not ended, and with budget and room left."""
        room = self.length < self.tokens.shape[1]
        return ~self.done & (self.budget > 0) & room


def create(
    config: ModelConfig, max_context: int, *, batch: int = 1, depth: int, mtp: bool
) -> DecodeCarry:
    """Return a carry that holds no token.

    Args:
      config: the model's.
      max_context: most tokens a sequence may hold.
      batch: B.
      depth: deepest draft it is used with; its anchor keeps W = 1 + depth rows.
      mtp: whether the model has an MTP head.

    Raises:
      ConfigError: if `depth` is not in 0..MAX_DEPTH, or drafts want a head there is
        not.
    """
    if not 0 <= depth <= MAX_DEPTH:
        raise ConfigError(f"depth: expected 0..{MAX_DEPTH}, found {depth}")
    if depth and not mtp:
        raise ConfigError(f"depth: expected 0 without an MTP head, found {depth}")
    # A buffer of its own for each field: a donated carry may not share any.
    zeros = lambda: jnp.zeros(batch, jnp.int32)  # noqa: E731
    head, anchor = None, None
    if mtp:
        head = model_cache.empty(config, max_context, batch, ratios=(0,))
        shape = (batch, 1 + depth, config.hc_streams, config.hidden)
        anchor = Anchor(jnp.zeros(shape), zeros())
    return DecodeCarry(
        cache=model_cache.empty(config, max_context, batch),
        mtp_cache=head,
        tokens=jnp.zeros((batch, max_context), jnp.int32),
        logits=jnp.zeros((batch, config.vocab)),
        anchor=anchor,
        budget=zeros(),
        done=jnp.zeros(batch, bool),
        statistics=Statistics(zeros(), zeros(), zeros(), zeros()),
    )
