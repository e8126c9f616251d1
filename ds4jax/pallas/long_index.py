"""An indexer's scores of many queries and its choice by them, on NVIDIA GPUs.

A program scores for one query, all of whose heads share their keys, some of these; what
each head makes with each key never leaves it.  Then a program chooses for one query: it
finds the least score that is good enough bit by bit, which takes no sort.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas.indexer import ordered

_KEYS = 128
"""Keys that a program scores."""

_TOP = np.uint32(1 << 31)

_MOST_KEYS = 32768
"""What a program that chooses has registers for."""


def serves(query: Float[Array, "T I J"], keys: Float[Array, "C J"]) -> bool:
    """Say whether `scores` is for queries and keys of these sizes."""
    whole = all(size & (size - 1) == 0 and size >= 16 for size in query.shape[1:])
    return whole and len(keys) >= _KEYS


def scores(
    query: Float[Array, "T I J"],
    keys: Float[Array, "C J"],
    share: Float[Array, "T I"],
    count: Int[Array, "T"],
    *,
    interpret: bool = False,
) -> Float[Array, "T C"]:
    """Return `sum_i share_i relu(query_i . key)` for the first keys of each query.

    Args:
      query: of each head.
      keys: shared by the heads.
      share: of each head.
      count: how many keys a query has; what follows them is undefined.
      interpret: without a GPU.

    The operands of the products are bfloat16.
    """
    rows, parts = len(query), pl.cdiv(len(keys), _KEYS)
    return pl.pallas_call(
        _kernel,
        grid=(parts, rows),
        out_shape=jax.ShapeDtypeStruct((rows, len(keys)), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="index_long",
    )(count, query.astype(jnp.bfloat16), keys.astype(jnp.bfloat16), share)


def _kernel(
    count_ref,  # [T]
    query_ref,  # [T, I, J]
    keys_ref,  # [C, J]
    share_ref,  # [T, I]
    out_ref,  # [T, C]
):
    # The last program begins early, and writes again what another one writes.
    first = jnp.minimum(pl.program_id(0) * _KEYS, keys_ref.shape[0] - _KEYS)
    row = pl.program_id(1)

    @pl.when(first < count_ref[row])
    def _score():
        own = pl.ds(first, _KEYS)
        match = jax.lax.dot_general(
            query_ref[row, :, :], keys_ref[own, :], (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        share = share_ref[row, :][:, None]
        out_ref[row, own] = jnp.sum(share * jnp.maximum(match, 0), 0)


def serves_choice(scores: Float[Array, "T C"]) -> bool:
    """Say whether `choose` is for so many scores."""
    return pl.next_power_of_2(scores.shape[1]) <= _MOST_KEYS


def choose(
    scores: Float[Array, "T C"], most: int, *, interpret: bool = False
) -> Int[Array, "T N"]:
    """Return the indices of each query's N = `most` best keys, -1 for none.

    In the order of the keys; of keys that score alike, the first.

    Args:
      scores: -inf for a key that a query has not.
      most: at most C.
      interpret: without a GPU.
    """
    rows, count = scores.shape
    size = pl.next_power_of_2(count)
    return pl.pallas_call(
        _choose_kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, most), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=8 if size > 4096 else 4),
        interpret=interpret,
        name=f"index_long_best_{most}",
    )(scores)


def _choose_kernel(
    scores_ref,  # [T, C]
    out_ref,  # [T, N]
):
    row, count, most = pl.program_id(0), scores_ref.shape[1], out_ref.shape[1]
    key = jnp.arange(pl.next_power_of_2(count))
    score = scores_ref[row, jnp.minimum(key, count - 1)]
    score = jnp.where(key < count, score, -jnp.inf)
    # Unsigned, in the order of the scores.
    rank = jax.lax.bitcast_convert_type(ordered(score), jnp.uint32) ^ _TOP

    def add_bit(number, least):
        with_bit = least | (_TOP >> number.astype(jnp.uint32))
        enough = jnp.sum((rank >= with_bit).astype(jnp.int32)) >= most
        return jnp.where(enough, with_bit, least)

    least = jax.lax.fori_loop(0, 32, add_bit, np.uint32(0))
    better, equal = rank > least, (rank == least).astype(jnp.int32)
    left = most - jnp.sum(better.astype(jnp.int32))
    chosen = (better | ((equal > 0) & (jnp.cumsum(equal) <= left))) & (score > -jnp.inf)
    # Each key has a place of its own, those that are not chosen behind those that are.
    first = jnp.cumsum(chosen.astype(jnp.int32))
    place = jnp.where(chosen, first - 1, jnp.max(first) + key - first)
    value = jnp.where(chosen, key, -1)
    plgpu.store(out_ref.at[row, place], value, mask=place < most)
