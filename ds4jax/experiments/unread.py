"""A state of any length that no text was read for.

What a decode pass takes depends on how much it looks at, not on what is there, so long
contexts can be measured without the minutes that reading them takes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.decode.carry import Anchor, DecodeCarry
from ds4jax.model.cache import Cache


def unread(carry: DecodeCarry, length: int) -> DecodeCarry:
    """Return a state of `length` tokens whose contents are random, always the same.

    Lengths, positions and tags are those of a text that was read, so that it decodes,
    drafts and is rewound as any other; rows are normal with deviation 1.

    Args:
      carry: of one sequence, without tokens; kept.
      length: at least 1, and room for it.
    """
    keys = iter(jax.random.split(jax.random.key(0), 4096))
    draw = lambda x: jax.random.normal(next(keys), x.shape, x.dtype)  # noqa: E731

    def filled(cache: Cache, length: int) -> Cache:
        layers = jax.tree.map(lambda x: draw(x) if _is_float(x) else x, cache.layers)
        return Cache(layers, jnp.full_like(cache.length, length))

    at = jnp.full_like(carry.reach, length)
    vocab = carry.logits.shape[-1]
    tokens = jax.random.randint(next(keys), carry.tokens.shape, 0, vocab, jnp.int32)
    head, anchor = carry.mtp_cache, carry.anchor
    if head is not None and anchor is not None:
        # The head's row of the newest token waits for the one after it.
        rows = length - 1
        head = filled(head, rows)
        layers = (
            dataclasses.replace(layer, tags=_tags(layer.raw.shape[:2], rows))
            for layer in head.layers
        )
        head = dataclasses.replace(head, layers=tuple(layers))
        anchor = Anchor(draw(anchor.streams), jnp.ones_like(anchor.rows), at - 1)
    return dataclasses.replace(
        carry,
        cache=filled(carry.cache, length),
        mtp_cache=head,
        tokens=tokens,
        logits=draw(carry.logits),
        anchor=anchor,
        reach=at,
    )


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _tags(shape: tuple[int, ...], rows: int) -> jax.Array:
    """Return which row each slot of a ring holds once `rows` were written, or -1."""
    newest, slots = rows - 1, shape[-1]
    tags = newest - (newest - np.arange(slots)) % slots
    return jnp.asarray(np.broadcast_to(np.maximum(tags, -1), shape), jnp.int32)
