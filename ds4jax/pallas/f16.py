"""Products of a few rows with float16 weights, on NVIDIA GPUs.

Operands and sums are float32: the weights are those of routers, hyper-connections,
compressors and indexers.  Each row's sum has one order, fixed by the weight's shape.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float16


def matvec(
    x: Float[Array, "R In"],
    w: Float16[Array | np.ndarray, "Out In"],
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Float[Array, "R Out"]:
    """Return the products of rows with a float16 weight, float32.

    Args:
      x: the rows.
      w: the weight.
      width: how many rows to compute; the others' results are copies of the last of
        these.  All if not given.
      interpret: without a GPU.
      tile: rows and columns that a program takes at a time, and its warps; by the
        weight's shape if not given.
    """
    n, k = w.shape
    bn, bk, warps = tile or _tile(n, k)
    return pl.pallas_call(
        functools.partial(_kernel, bn=bn, bk=bk, width=width or len(x)),
        grid=(n // bn,),
        out_shape=jax.ShapeDtypeStruct((len(x), n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"f16_{width or len(x)}x{n}x{k}",
    )(x, w)


def _tile(n: int, k: int) -> tuple[int, int, int]:
    if n <= 512:
        return 1, min(k & -k, 4096), 8
    return min(n & -n, 2), min(k & -k, 1024), 4


def _kernel(
    x_ref,  # [R, In]
    w_ref,  # [Out, In]
    out_ref,  # [R, Out]
    *, bn, bk, width,
):  # fmt: skip
    own = pl.ds(pl.program_id(0) * bn, bn)

    def add(step, sums):
        columns = pl.ds(step * bk, bk)
        w = w_ref[own, columns].astype(jnp.float32)
        return tuple(
            so_far + w * x_ref[row, columns][None] for row, so_far in enumerate(sums)
        )

    zero = jnp.zeros((bn, bk), jnp.float32)
    sums = jax.lax.fori_loop(0, w_ref.shape[1] // bk, add, (zero,) * width)
    results = [jnp.sum(so_far, -1) for so_far in sums]
    for row in range(out_ref.shape[0]):
        out_ref[row, own] = results[min(row, width - 1)]
