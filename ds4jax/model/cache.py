"""Everything the model remembers: rings by absolute position, and compressed rows.

A ring of P slots keeps the row of position t in slot `t mod P` and is never shifted;
a compressed row w is kept at index w.  What is live follows from `length` alone, so
`cache.replace(length=length - m)` *is* the rollback of m <= slack tokens: slots past
`length` hold garbage by design and are masked by position (ARCHITECTURE §12).

The types of a pytree's fields are not checked at run time (`no_type_check`): JAX
rebuilds its nodes around whatever stands for an array, a shape or None among them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.errors import CapacityError, ConfigError

DECODE_ROWS = 8
"""Rows of every decode pass.

XLA chooses the code of an op, and so its bits, by its shape.  The row contract (a
row's result does not depend on how many rows the pass has) therefore holds by
construction: a pass of 1 to 8 rows over a cache always has 8, the missing ones copies
of the last that leave no trace, and takes one sequence after the other.  A copy routes
to the same experts, so it reads no more weights.  Longer passes are prefill, outside
the contract.
"""

DEFAULT_SLACK = 32
"""Slots a ring has beyond what one query can see: how far a rollback may reach."""


@struct.dataclass
@no_type_check
class CompressorCache:
    """State of one compressor.

    Attributes:
      inputs: float32 [B, P, 2, halves * N]: the ring of per-token inputs, value and
        gate (its APE row already added); halves is 2 for CSA and 1 for HCA.
      rows: float32 [B, C, N]: the finished rows, normed, rotated and rounded.
    """

    inputs: Array
    rows: Array


@struct.dataclass
@no_type_check
class LayerCache:
    """State of one layer.

    Attributes:
      raw: float32 [B, P, K]: the ring of key = value rows.
      compressor: of a CSA or HCA layer, with N = K; else None.
      indexer: of a CSA layer, with N = J; else None.
      tags: int32 [B, P]: the position whose row each slot of `raw` holds, -1 for none.
        Of a layer whose rows may have gaps, the MTP head's; elsewhere None, and what a
        slot holds follows from `length`.
    """

    raw: Array
    compressor: CompressorCache | None = None
    indexer: CompressorCache | None = None
    tags: Array | None = None


@struct.dataclass
@no_type_check
class Cache:
    """State of a stack of layers for B sequences.

    Attributes:
      layers: one LayerCache per layer.
      length: int32 [B]: committed tokens of each sequence; every count and mask
        derives from it.
    """

    layers: tuple[LayerCache, ...]
    length: Array

    @property
    def nbytes(self) -> int:
        """Return the bytes the cache takes on the device."""
        return sum(
            math.prod(x.shape) * np.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(self)
        )


@struct.dataclass
@no_type_check
class Rows:
    """Which rows a pass computes.

    Attributes:
      start: int32 [B]: position of the first row of each sequence.
      count: int32 [B]: how many of the T rows are real.  The rest leave no trace.
      positions: int32 [B, T]: absolute position of each row.
      is_decode: static; whether this pass is under the row contract.
    """

    start: Int[Array, "B"]
    count: Int[Array, "B"]
    positions: Int[Array, "B T"]
    is_decode: bool = struct.field(pytree_node=False)

    @property
    def width(self) -> int:
        """Return T, the rows of the pass."""
        return self.positions.shape[1]

    @property
    def end(self) -> Int[Array, "B"]:
        """Return the position after the last real row of each sequence."""
        return self.start + self.count


@struct.dataclass
@no_type_check
class View:
    """What the queries of one pass can look at: old rows and this pass's own.

    Attributes:
      rows: [B, S, ...]: the rows, in an order that depends on positions alone.
      positions: int32 [B, S]: absolute position of each row; negative for none.
      start: int32 [B]: first position of this pass.
      ring: static P, slots of the ring that leads `rows` (0: no ring).
      appended: static; whether this pass's rows follow the ring, not lie in it.
    """

    rows: Array
    positions: Int[Array, "B S"]
    start: Int[Array, "B"]
    ring: int = struct.field(pytree_node=False)
    appended: bool = struct.field(pytree_node=False)

    def take(self, positions: Int[Array, "B N"]) -> Array:
        """Return the rows of `positions` [B, N, ...]; garbage where there is none."""
        start = self.start[:, None]
        if not self.ring:
            index = positions - start
        elif self.appended:
            new = positions >= start
            index = jnp.where(new, self.ring + positions - start, positions % self.ring)
        else:
            index = positions % self.ring
        index = jnp.clip(index, 0, self.rows.shape[1] - 1)
        index = index.reshape(*index.shape, *(1,) * (self.rows.ndim - 2))
        return jnp.take_along_axis(self.rows, index, axis=1)


def forget(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """Return a tagged cache of which only the rows before `length` are remembered."""

    def cut(layer: LayerCache) -> LayerCache:
        assert layer.tags is not None
        known = layer.tags < length[:, None]
        return dataclasses.replace(layer, tags=jnp.where(known, layer.tags, -1))

    return Cache(tuple(map(cut, cache.layers)), length)


def row_at(x: Array, index: Int[Array, "B"]) -> Array:
    """Return `x[b, index[b]]` for every b."""
    index = index.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1).squeeze(1)


def scatter(store: Array, index: Int[Array, "B N"], new: Array) -> Array:
    """Return `store [B, S, ...]` with `new [B, N, ...]` at `index`; others dropped.

    An index outside 0..S-1 writes nothing.
    """
    index = jnp.where(index < 0, store.shape[1], index)
    batch = jnp.arange(store.shape[0])[:, None]
    return store.at[batch, index].set(new, mode="drop", unique_indices=False)


def extend(ring: Array | None, new: Array, rows: Rows) -> tuple[View, Array | None]:
    """Append a pass's rows to a ring.

    Args:
      ring: [B, P, ...], or None for a sequence that starts here and keeps nothing.
      new: [B, T, ...].
      rows: where `new` belongs.

    Returns:
      The view for this pass, and the ring after it.  A decode pass looks at the ring
      itself, whose size and order do not depend on T: that is the row contract.  A
      longer pass would overwrite rows its first queries see, so it looks at the old
      ring followed by `new`.
    """
    if ring is None:
        view = View(new, rows.positions, rows.start, ring=0, appended=True)
        return view, None
    after = overwrite(ring, new, rows)
    if rows.is_decode:
        return look_at(after, rows), after
    size = ring.shape[1]
    view = View(
        jnp.concatenate([ring, new], axis=1),
        jnp.concatenate([_held(size, rows.start), rows.positions], axis=1),
        rows.start,
        ring=size,
        appended=True,
    )
    return view, after


def overwrite(ring: Array, new: Array, rows: Rows) -> Array:
    """Return a ring [B, P, ...] after a pass's rows `new` [B, T, ...]."""
    size, offset = ring.shape[1], jnp.arange(rows.width)
    real = (offset < rows.count[:, None]) & (offset >= rows.count[:, None] - size)
    return scatter(ring, jnp.where(real, rows.positions % size, -1), new)


def look_at(after: Array, rows: Rows) -> View:
    """Return the view for a decode pass of the ring after it."""
    size = after.shape[1]
    held = _held(size, rows.end)
    return View(after, held, rows.start, ring=size, appended=False)


def _held(size: int, end: Int[Array, "B"]) -> Int[Array, "B P"]:
    """Return which positions the slots of a ring hold before `end`; negative: none."""
    last = end[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def extend_tags(
    tags: Array | None, view: View, rows: Rows
) -> tuple[View, Array | None]:
    """Tag a pass's rows, and take out of `view` what no tag vouches for."""
    if tags is None:
        return view, None
    tagged, tags = extend(tags, rows.positions, rows)
    known = tagged.rows == view.positions
    positions = jnp.where(known, view.positions, -1)
    return dataclasses.replace(view, positions=positions), tags


def blank_invisible(
    rows: Float[Array, "B S N"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B S N"]:
    """Zero the rows that no query sees, so that garbage, even NaN, cannot leak.

    A masked row has probability exactly 0, and 0 * NaN is NaN.
    """
    return jnp.where(jnp.any(visible, axis=1)[..., None], rows, 0)


def _compressor_cache(
    batch: int, width: int, ratio: int, capacity: int, slack: int
) -> CompressorCache:
    halves = 2 if ratio == CSA_RATIO else 1
    return CompressorCache(
        inputs=jnp.zeros((batch, halves * ratio + slack, 2, halves * width)),
        # XLA has no maximum over no rows; one that never gets live is masked.
        rows=jnp.zeros((batch, max(capacity // ratio, 1), width)),
    )


def _layer_cache(
    config: ModelConfig, ratio: int, batch: int, capacity: int, slack: int, tagged: bool
) -> LayerCache:
    ring = config.window + slack
    make = lambda width: _compressor_cache(batch, width, ratio, capacity, slack)  # noqa: E731
    return LayerCache(
        raw=jnp.zeros((batch, ring, config.head_dim)),
        compressor=make(config.head_dim) if ratio else None,
        indexer=make(config.index_dim) if ratio == CSA_RATIO else None,
        tags=jnp.full((batch, ring), -1, jnp.int32) if tagged else None,
    )


def empty(
    config: ModelConfig,
    max_context: int,
    batch: int = 1,
    slack: int = DEFAULT_SLACK,
    ratios: tuple[int, ...] | None = None,
    tagged: bool = False,
) -> Cache:
    """Return a cache that has seen nothing.

    Args:
      config: the model's.
      max_context: most tokens a sequence may hold.
      batch: B.
      slack: how many tokens beyond a query's sight every ring keeps.
      ratios: compress ratio of each layer; the trunk's by default, `(0,)` for the
        MTP block.
      tagged: whether rows may have gaps, see `LayerCache.tags`.

    Raises:
      CapacityError: if `max_context` is not positive.
      ConfigError: if `slack` is too small for a decode pass.
    """
    if max_context < 1:
        raise CapacityError(f"max_context: expected at least 1, found {max_context}")
    if slack < DECODE_ROWS:
        raise ConfigError(f"slack: expected at least {DECODE_ROWS}, found {slack}")
    ratios = config.compress_ratios if ratios is None else ratios
    return Cache(
        layers=tuple(
            _layer_cache(config, r, batch, max_context, slack, tagged) for r in ratios
        ),
        length=jnp.zeros(batch, jnp.int32),
    )


def nbytes(config: ModelConfig, max_context: int, mtp: bool = False) -> int:
    """Return the bytes of a cache for one sequence, without allocating it.

    Raises:
      CapacityError: as `empty`.
    """
    ratios = (0,) if mtp else None
    make = lambda: empty(config, max_context, ratios=ratios, tagged=mtp)  # noqa: E731
    return jax.eval_shape(make).nbytes


def live_nbytes(config: ModelConfig, length: int, mtp: bool = False) -> int:
    """Return the bytes of the rows that tokens after the first `length` can still see.

    Of one sequence, and of any cache that holds it: what is allocated beyond them, and
    what rings keep for rollbacks, is not counted.
    """

    def floats(ratio: int) -> int:
        raw = min(length, config.window - 1) * config.head_dim
        if not ratio:
            return raw
        halves, finished = 1 + (ratio == CSA_RATIO), length // ratio
        waiting = length - max(finished - halves + 1, 0) * ratio
        width = config.head_dim + (config.index_dim if ratio == CSA_RATIO else 0)
        return raw + width * (finished + waiting * 2 * halves)

    ratios = (0,) if mtp else config.compress_ratios
    return sum(map(floats, ratios)) * np.dtype(np.float32).itemsize
