"""Attention of many queries over their windows and what they chose, on NVIDIA GPUs.

A program takes one query, all of whose heads share their keys, which are the values
too: so each row that it can see is read once, and no other is.  A launch before norms
and rotates the queries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from ds4jax.pallas import rope
from ds4jax.pallas.attention import Turn

_ROWS = 64
"""Rows that a program takes at a time."""


def serves(query: Float[Array, "T H K"], window: int) -> bool:
    """Say whether `attend` is for queries and windows of these sizes."""
    _, heads, k = query.shape
    whole = all(size & (size - 1) == 0 for size in (heads, k))
    return whole and heads >= 16 and k >= 16 and window % _ROWS == 0


def prepare(
    query: Float[Array, "T H K"], turn: Turn, eps: float, *, interpret: bool = False
) -> Float[Array, "T H K"]:
    """Return queries normed by head and rotated, bfloat16.

    Args:
      query: what their projection gives.
      turn: their rotation.
      eps: of the norm.
      interpret: without a GPU.
    """
    count, heads, _ = query.shape
    return pl.pallas_call(
        functools.partial(_prepare_kernel, eps=eps),
        grid=(heads, count),
        out_shape=jax.ShapeDtypeStruct(query.shape, jnp.bfloat16),
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="attend_long_prepare",
    )(query, *turn)


def _prepare_kernel(
    query_ref,  # [T, H, K]
    cos_ref,  # [T, R]
    sin_ref,  # [T, R]
    out_ref,  # [T, H, K]
    *, eps,
):  # fmt: skip
    head, row, k = pl.program_id(0), pl.program_id(1), query_ref.shape[2]
    channel = jnp.arange(k)
    query = query_ref[row, head, :]
    scale = 1 / jnp.sqrt(jnp.sum(query * query) / k + eps)
    # Triton cannot swap the channels of a pair, but read them so.
    swapped = query_ref[row, head, channel ^ 1]
    cos, sin = rope.angles((cos_ref, sin_ref), row, channel, k)
    query = query * cos + swapped * sin
    out_ref[row, head, :] = (query * scale).astype(out_ref.dtype)


def attend(
    query: Float[Array, "T H K"],
    recent: Float[Array, "S K"],
    known: Bool[Array, "S"],
    compressed: Float[Array, "C K"] | None = None,
    index: Int[Array, "T N"] | None = None,
    *,
    sinks: Float[Array, "H"],
    turn: Turn,
    groups: int,
    interpret: bool = False,
) -> Float[Array, "T H K"]:
    """Return one softmax-weighted sum for each query and head, rotated back, bfloat16.

    The groups of heads lie one after the other, as the products need them that are made
    of each.

    Args:
      query: of `prepare`, of successive positions.
      recent: S = T + window - 1 rows: the first query's window, and on from there.
      known: which of them there are.
      compressed: rows to choose from.
      index: which of them each query sees, -1 for none.
      sinks: a logit per head that takes probability and gives no value.
      turn: the queries' rotation.
      groups: of heads.
      interpret: without a GPU.

    The operands of the products are bfloat16.
    """
    count, heads, k = query.shape
    rows = [recent.astype(jnp.bfloat16), known]
    if compressed is not None and index is not None:
        fill = -index.shape[1] % _ROWS
        index = jnp.pad(index, ((0, 0), (0, fill)), constant_values=-1)
        rows += [compressed.astype(jnp.bfloat16), index]
    rope_dim, own = turn[0].shape[1], heads // groups
    out, turned = pl.pallas_call(
        functools.partial(_kernel, window=len(recent) - count + 1),
        grid=(count,),
        out_shape=(
            jax.ShapeDtypeStruct((groups, count, own, k), jnp.bfloat16),
            jax.ShapeDtypeStruct((groups, count, own, rope_dim), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="attend_long",
    )(query, sinks, *rows)
    # Where they lie: of all channels a few are rotated.
    cos, sin = (angle[:, None] for angle in turn)
    swapped = turned.reshape(*turned.shape[:-1], -1, 2)[..., ::-1]
    back = turned * cos - swapped.reshape(turned.shape) * sin
    out = out.at[..., k - rope_dim :].set(back.astype(out.dtype))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def _kernel(
    query_ref,  # [T, H, K]
    sinks_ref,  # [H]
    recent_ref,  # [S, K]
    known_ref,  # [S]
    *refs,  # of compressed [C, K], index [T, N], where there are; then of the result
    # [groups, T, H / groups, K], and of its channels that are rotated [.., R]
    window,
):  # fmt: skip
    *chosen_refs, out_ref, turned_ref = refs
    row = pl.program_id(0)
    heads, k = query_ref.shape[1:]
    query = query_ref[row, :, :]

    def add(state, rows, visible):
        peak, total, summed = state
        logits = jax.lax.dot_general(
            query, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits = jnp.where(visible[None], logits * k**-0.5, -jnp.inf)
        higher = jnp.maximum(peak, jnp.max(logits, -1))
        weight, scale = jnp.exp(logits - higher[:, None]), jnp.exp(peak - higher)
        more = jax.lax.dot_general(
            weight.astype(rows.dtype), rows, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        total = total * scale + jnp.sum(weight, -1)
        return higher, total, summed * scale[:, None] + more

    def add_recent(number, state):
        own = pl.ds(row + number * _ROWS, _ROWS)
        return add(state, recent_ref[own, :], known_ref[own])

    def add_chosen(number, state):
        rows_ref, index_ref = chosen_refs
        index = index_ref[row, pl.ds(number * _ROWS, _ROWS)]
        rows = rows_ref[jnp.maximum(index, 0)[:, None], jnp.arange(k)[None]]
        return add(state, rows, index >= 0)

    # The sink is in the sum from the start, so a peak is finite.
    state = sinks_ref[:], jnp.ones(heads), jnp.zeros((heads, k))
    state = jax.lax.fori_loop(0, window // _ROWS, add_recent, state)
    if chosen_refs:
        parts = chosen_refs[1].shape[1] // _ROWS
        state = jax.lax.fori_loop(0, parts, add_chosen, state)
    _, total, summed = state
    found, own = summed / total[:, None], out_ref.shape[2]
    head, channel = jnp.arange(heads)[:, None], jnp.arange(k)[None]
    out_ref[head // own, row, head % own, channel] = found.astype(out_ref.dtype)
    place = channel - (k - turned_ref.shape[3])
    turned = turned_ref.at[head // own, row, head % own, jnp.maximum(place, 0)]
    plgpu.store(turned, found, mask=jnp.broadcast_to(place >= 0, found.shape))
