"""Attention of a few rows over shared and over gathered rows, on NVIDIA GPUs.

Each source is cut into parts of a fixed size, and programs take a part each, for their
softmax and its sums; one more kernel puts the parts of all sources together in their
order.  What is multiplied and in what order depends on the sources' sizes alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

_PART = 32
"""Rows of a part."""

_MOST_PARTS = 32
"""Of a source: what `_together_kernel` has registers for."""

_HEADS = 16
"""Query heads of a program, the fewest that matrix units take at a time."""

Source = tuple[Float[Array, "..."], Bool[Array, "T _"]]
"""Rows [S, K] shared by the queries or [T, S, K], and which are visible."""


def serves(query: Float[Array, "T H K"], sources: list[Source]) -> bool:
    """Say whether `attend` is for queries and sources of these sizes."""
    _, heads, k = query.shape
    sizes = (rows.shape[-2] for rows, _ in sources)
    parts = [size / _PART for size in sizes]
    whole = all(part in range(1, _MOST_PARTS + 1) for part in parts)
    return whole and heads % _HEADS == 0 and k & (k - 1) == 0 and k >= 16


def attend(
    query: Float[Array, "T H K"],
    sources: list[Source],
    sinks: Float[Array, "H"],
    dtype: str,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "T H K"]:
    """Return `model.attention.attend` of one sequence, float32.

    Args:
      query: rotated queries.
      sources: as above.
      sinks: a logit per head that takes probability and gives no value.
      dtype: operand type of the two products.
      width: how many rows, the first ones, are not copies of the last of these.
      interpret: without a GPU.
    """
    width = width or len(query)
    parts = [
        _parts(query, rows, visible, dtype, width, interpret)
        for rows, visible in sources
    ]
    heads, k = query.shape[1:]
    return pl.pallas_call(
        functools.partial(_together_kernel, width=width),
        grid=(len(query), heads),
        out_shape=jax.ShapeDtypeStruct(query.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="attend_together",
    )(sinks, *(array for part in parts for array in part))


def _parts(query, rows, visible, dtype, width, interpret):
    heads, k = query.shape[1:]
    parts = rows.shape[-2] // _PART
    shape = parts, width, heads
    return pl.pallas_call(
        functools.partial(_part_kernel, dtype=dtype, shared=rows.ndim == 2),
        grid=(parts, heads // _HEADS, width),
        out_shape=(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, k), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=f"attend_{parts}",
    )(query, rows, visible)


def _part_kernel(
    query_ref,  # [T, H, K]
    rows_ref,  # [S, K] or [T, S, K]
    visible_ref,  # [T, S]
    peak_ref,  # [parts, width, H]
    total_ref,  # [parts, width, H]
    summed_ref,  # [parts, width, H, K]
    *, dtype, shared,
):  # fmt: skip
    part, row = pl.program_id(0), pl.program_id(2)
    heads = pl.ds(pl.program_id(1) * _HEADS, _HEADS)
    own = pl.ds(part * _PART, _PART)
    rows = (rows_ref[own, :] if shared else rows_ref[row, own, :]).astype(dtype)
    query = query_ref[row, heads, :]
    product = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        preferred_element_type=jnp.float32,
    )
    logits = product(query.astype(dtype), rows, (((1,), (1,)), ((), ())))
    logits = logits * query_ref.shape[2] ** -0.5
    logits = jnp.where(visible_ref[row, own][None], logits, -jnp.inf)
    # Finite, for parts of which nothing is visible.
    peak = jnp.maximum(jnp.max(logits, -1), -1e30)
    weight = jnp.exp(logits - peak[:, None])
    peak_ref[part, row, heads] = peak
    total_ref[part, row, heads] = jnp.sum(weight, -1)
    summed = product(weight.astype(dtype), rows, (((1,), (0,)), ((), ())))
    summed_ref[part, row, heads, :] = summed


def _together_kernel(
    sinks_ref,  # [H]
    *refs,  # of each source peak, total [parts, width, H], summed [parts, width, H, K];
    # the last is of the output [T, H, K]
    width,
):
    *refs, out_ref = refs
    row, head = pl.program_id(0), pl.program_id(1)
    read = jnp.minimum(row, width - 1)
    sources = []
    for peak_ref, total_ref, summed_ref in zip(*[iter(refs)] * 3, strict=True):
        size = pl.next_power_of_2(peak_ref.shape[0])
        part = jnp.minimum(jnp.arange(size), peak_ref.shape[0] - 1)
        real = jnp.arange(size) < peak_ref.shape[0]
        peak = jnp.where(real, peak_ref[part, read, head], -jnp.inf)
        total = total_ref[part, read, head]
        summed = summed_ref[
            part[:, None], read, head, jnp.arange(out_ref.shape[2])[None]
        ]
        sources.append((peak, total, summed))
    highest = sink = sinks_ref[head]
    for peak, _, _ in sources:
        highest = jnp.maximum(highest, jnp.max(peak))
    total, summed = jnp.exp(sink - highest), jnp.zeros(out_ref.shape[2], jnp.float32)
    for peak, totals, sums in sources:
        weight = jnp.exp(peak - highest)
        total += jnp.sum(weight * totals)
        summed += jnp.sum(weight[:, None] * sums, 0)
    out_ref[row, head, :] = summed / total
