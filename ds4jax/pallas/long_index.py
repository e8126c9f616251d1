"""An indexer's scores of many queries, on NVIDIA GPUs.

A program takes one query, all of whose heads share their keys, and some of these; what
each head makes with each key never leaves it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_KEYS = 128
"""Keys that a program takes."""


def serves(query: Float[Array, "T I J"], keys: Float[Array, "C J"]) -> bool:
    """Say whether `scores` is for queries and keys of these sizes."""
    whole = all(size & (size - 1) == 0 and size >= 16 for size in query.shape[1:])
    return whole and len(keys) % _KEYS == 0


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
    rows, parts = len(query), len(keys) // _KEYS
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
    first, row = pl.program_id(0) * _KEYS, pl.program_id(1)

    @pl.when(first < count_ref[row])
    def _score():
        own = pl.ds(first, _KEYS)
        match = jax.lax.dot_general(
            query_ref[row, :, :], keys_ref[own, :], (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        share = share_ref[row, :][:, None]
        out_ref[row, own] = jnp.sum(share * jnp.maximum(match, 0), 0)
