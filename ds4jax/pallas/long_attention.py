"""Attention of many queries over their windows and what they chose, on NVIDIA GPUs.

A program takes one query, all of whose heads share their keys, which are the values
too: so each row that it can see is read once, and no other is.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

_ROWS = 64
"""Rows that a program takes at a time."""


def serves(query: Float[Array, "T H K"], window: int) -> bool:
    """Say whether `attend` is for queries and windows of these sizes."""
    _, heads, k = query.shape
    whole = all(size & (size - 1) == 0 for size in (heads, k))
    return whole and heads >= 16 and k >= 16 and window % _ROWS == 0


def attend(
    query: Float[Array, "T H K"],
    recent: Float[Array, "S K"],
    known: Bool[Array, "S"],
    compressed: Float[Array, "C K"] | None = None,
    index: Int[Array, "T N"] | None = None,
    *,
    sinks: Float[Array, "H"],
    interpret: bool = False,
) -> Float[Array, "T H K"]:
    """Return one softmax-weighted sum for each query and head, float32.

    Args:
      query: rotated queries, of successive positions.
      recent: S = T + window - 1 rows: the first query's window, and on from there.
      known: which of them there are.
      compressed: rows to choose from.
      index: which of them each query sees, -1 for none.
      sinks: a logit per head that takes probability and gives no value.
      interpret: without a GPU.

    The operands of the products are bfloat16.
    """
    count, heads, k = query.shape
    rows = [recent.astype(jnp.bfloat16), known]
    if compressed is not None and index is not None:
        fill = -index.shape[1] % _ROWS
        index = jnp.pad(index, ((0, 0), (0, fill)), constant_values=-1)
        rows += [compressed.astype(jnp.bfloat16), index]
    return pl.pallas_call(
        functools.partial(_kernel, window=len(recent) - count + 1),
        grid=(count,),
        out_shape=jax.ShapeDtypeStruct(query.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="attend_long",
    )(query.astype(jnp.bfloat16), sinks, *rows)


def _kernel(
    query_ref,  # [T, H, K]
    sinks_ref,  # [H]
    recent_ref,  # [S, K]
    known_ref,  # [S]
    *refs,  # of compressed [C, K], index [T, N], where there are; and out [T, H, K]
    window,
):  # fmt: skip
    *chosen_refs, out_ref = refs
    row = pl.program_id(0)
    heads, k = out_ref.shape[1:]
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
    out_ref[row, :, :] = summed / total[:, None]
