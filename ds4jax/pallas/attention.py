"""Attention of a few rows over shared and over chosen rows, on NVIDIA GPUs.

Each source is cut into parts of a fixed size, and programs take a part each, for its
softmax and its sums, with queries that they norm and rotate themselves; one more launch
puts the parts of all sources together in their order, rotates back and writes fixed
point.  What is multiplied and in what order depends on the sources' sizes alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from ds4jax.pallas import rope
from ds4jax.pallas.fixed_point import GROUP, FixedPoint, Order, shapes, store

_PARTS = 32, 64
"""Rows of a part: the smaller are faster, as long as they are few."""

_FEW_PARTS = 16
"""So many that all programs of two rows of Flash's 64 heads run at once on an H200."""

_MOST_PARTS = 64
"""Of all sources together: what `_together_kernel` has registers for."""

_CHANNELS = 128
"""Of a product's operands at a time: more take all the memory that programs share."""

_HEADS = 16
"""Query heads of a program that attends, the fewest that matrix units take."""


Source = tuple[Float[Array, "_ K"], Bool[Array, "T _"], Int[Array, "T _"] | None]
"""Rows as of `model.attention.Source`, of one sequence."""

Turn = tuple[Float[Array, "T R"], Float[Array, "T R"]]
"""A rotation of the last R channels, see `model.rope.turn`."""


def serves(heads: int, k: int, rope_dim: int, sizes: list[int]) -> bool:
    """Say whether these are for such attention, and sources of S rows each."""
    few = _cut(sizes)[1][-1] <= _MOST_PARTS
    powers = all(size & (size - 1) == 0 for size in (k, rope_dim))
    return few and heads % _HEADS == 0 and powers and rope_dim >= GROUP


def _cut(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Return the rows of a part, and the first part of each source and behind all."""
    for rows in _PARTS:
        ends = list(itertools.accumulate((pl.cdiv(n, rows) for n in sizes), initial=0))
        if ends[-1] <= _FEW_PARTS:
            break
    return rows, ends


def attend(
    query: Float[Array, "T H K"],
    sources: Sequence[Source],
    sinks: Float[Array, "H"],
    turn: Turn,
    eps: float,
    dtype: str,
    groups: int,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> FixedPoint:
    """Return one softmax-weighted sum over all sources, rotated back, for products.

    Args:
      query: what their projection gives; normed by head and rotated here.
      sources: what they see.
      sinks: a logit per head that takes probability and gives no value.
      turn: the queries' rotation.
      eps: of their norm.
      dtype: operand type of the two products, and of those to come.
      groups: into how many parts the heads are cut for those.
      width: how many rows, the first ones, are not copies; there is nothing in the
        others' places.
      interpret: without a GPU.

    Returns:
      T * groups rows of K H / groups, the groups of a row one after the other.
    """
    width, (rows, heads, k) = width or len(query), query.shape
    part, ends = _cut([visible.shape[1] for _, visible, _ in sources])
    shape = ends[-1], width, heads
    call = functools.partial(pl.pallas_call, interpret=interpret)
    parts = call(
        functools.partial(
            _part_kernel, size=part, ends=ends, eps=eps, dtype=dtype,
            chosen=[index is not None for _, _, index in sources],
        ),
        grid=(ends[-1], heads // _HEADS, width),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, k), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        name="attend_parts",
    )(query, *turn, *jax.tree.leaves(sources))  # fmt: skip
    found = call(
        functools.partial(_together_kernel, dtype=dtype, groups=groups),
        grid=(width, heads, k // turn[0].shape[1]),
        out_shape=shapes(rows * groups, heads // groups * k, dtype, Order()),
        compiler_params=plgpu.CompilerParams(num_warps=2),
        name="attend_together",
    )(sinks, *turn, *parts)
    return FixedPoint(*found)


def _part_kernel(
    query_ref,  # [T, H, K]
    cos_ref,  # [T, R]
    sin_ref,  # [T, R]
    *refs,  # of each source its rows, what is visible and, if chosen, the index; then
    # peak and total [parts, width, H], summed [parts, width, H, K]
    size, ends, chosen, eps, dtype,
):  # fmt: skip
    part, row = pl.program_id(0), pl.program_id(2)
    first = pl.program_id(1) * _HEADS
    heads = pl.ds(first, _HEADS)
    *refs, peak_ref, total_ref, summed_ref = refs
    refs, k, r = iter(refs), query_ref.shape[2], cos_ref.shape[1]
    channels = min(k, _CHANNELS)
    blocks = range(0, k, channels)
    product = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )

    def rotated(at, x):
        if at + channels <= k - r:
            return x
        channel = at + jnp.arange(channels)
        of_pair = query_ref[row, first + jnp.arange(_HEADS)[:, None], channel[None] ^ 1]
        cos, sin = rope.angles((cos_ref, sin_ref), row, channel, k)
        return x * cos[None] + of_pair * sin[None]

    for start, end, is_chosen in zip(ends, ends[1:], chosen, strict=False):
        rows_ref, visible_ref = next(refs), next(refs)
        index_ref = next(refs) if is_chosen else None

        @pl.when((start <= part) & (part < end))
        def _add(start=start, rows=rows_ref, visible=visible_ref, index=index_ref):
            place = (part - start) * size + jnp.arange(size)
            own = jnp.minimum(place, visible.shape[1] - 1)
            seen = visible[row, own] & (place < visible.shape[1])
            of = (own if index is None else index[row, own])[:, None]

            def values(at):
                found = rows[of, (at + jnp.arange(channels))[None]]
                # Zero times what an unseen row holds may be no number.
                return jnp.where(seen[:, None], found, 0).astype(dtype)

            held = [values(at) for at in blocks]
            queries = [query_ref[row, heads, pl.ds(at, channels)] for at in blocks]
            squares = jnp.sum(sum(query * query for query in queries), -1)
            logits = jnp.zeros((_HEADS, size), jnp.float32)
            for at, query, key in zip(blocks, queries, held, strict=True):
                query = rotated(at, query).astype(dtype)
                logits += product(query, key, (((1,), (1,)), ((), ())))
            # The norm is a factor of a head's logits.
            scale = k**-0.5 / jnp.sqrt(squares / k + eps)
            logits = jnp.where(seen[None], logits * scale[:, None], -jnp.inf)
            # Finite, for parts of which nothing is visible.
            peak = jnp.maximum(jnp.max(logits, -1), -1e30)
            weight = jnp.exp(logits - peak[:, None])
            peak_ref[part, row, heads] = peak
            total_ref[part, row, heads] = jnp.sum(weight, -1)
            weight = weight.astype(dtype)
            for at, value in zip(blocks, held, strict=True):
                summed = product(weight, value, (((1,), (0,)), ((), ())))
                summed_ref[part, row, heads, pl.ds(at, channels)] = summed


def _together_kernel(
    sinks_ref,  # [H]
    cos_ref,  # [T, R]
    sin_ref,  # [T, R]
    peak_ref,  # [parts, width, H]
    total_ref,  # [parts, width, H]
    summed_ref,  # [parts, width, H, K]
    *refs,  # of the result
    dtype, groups,
):  # fmt: skip
    row, head, block = (pl.program_id(axis) for axis in range(3))
    parts, r = len(peak_ref), cos_ref.shape[1]
    size = pl.next_power_of_2(parts)
    part = jnp.minimum(jnp.arange(size), parts - 1)
    peak = jnp.where(jnp.arange(size) < parts, peak_ref[part, row, head], -jnp.inf)
    sink = sinks_ref[head]
    highest = jnp.maximum(sink, jnp.max(peak))
    share = jnp.exp(peak - highest)
    total = jnp.sum(share * total_ref[part, row, head]) + jnp.exp(sink - highest)
    share = (share / total)[:, None]

    def load(flip):
        channels = block * r + (jnp.arange(r) ^ flip)
        return jnp.sum(share * summed_ref[part[:, None], row, head, channels[None]], 0)

    def write(value):
        of_group = sinks_ref.shape[0] // groups
        place = (head % of_group * pl.num_programs(2) + block) * (r // GROUP)
        x = value.reshape(r // GROUP, 2, 4, 4)
        own = row * groups + head // of_group
        store(refs, x, own, place, dtype, Order())

    @pl.when(block < pl.num_programs(2) - 1)
    def _keep():
        write(load(0))

    @pl.when(block == pl.num_programs(2) - 1)
    def _turn():
        write(load(0) * cos_ref[row, :] - load(1) * sin_ref[row, :])
