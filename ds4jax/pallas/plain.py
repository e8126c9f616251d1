"""Products of a few rows with float16 or float32 weights, on NVIDIA GPUs.

Sums are float32.  The weights are a plan's plain ones: those of routers,
hyper-connections, compressors and indexers.  Each row's sum has one order, fixed by the
weight's shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ds4jax.pallas.dense import divisor, for_own_weight, read_once, write_rows


def matvec(
    x: Float[Array, "R In"],
    w: Float[Array | np.ndarray, "Out In"],
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Float[Array, "R Out"]:
    """Return the products of rows with a weight, float32; as `matvecs`."""
    (out,) = matvecs(x, [w], width, interpret=interpret, tile=tile)
    return out


def matvecs(
    x: Float[Array, "R In"],
    weights: Sequence[Float[Array | np.ndarray, "_ In"]],
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Float[Array, "R _"], ...]:
    """Return the products of rows with each of some weights, in one launch, float32.

    Args:
      x: the rows.
      weights: [Out, In], each with an Out of its own.
      width: how many rows to compute; the others' results are copies of the last of
        these.  All if not given.
      interpret: without a GPU.
      tile: rows and columns that a program takes at a time, and its warps; by the
        weights' shapes if not given.
    """
    outs, k = [len(w) for w in weights], x.shape[1]
    bn, bk, warps = tile or _tile(outs, k)
    return pl.pallas_call(
        functools.partial(
            _kernel, bn=bn, bk=bk, width=width or len(x), interpret=interpret
        ),
        grid=(sum(n // bn for n in outs),),
        out_shape=tuple(jax.ShapeDtypeStruct((len(x), n), jnp.float32) for n in outs),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"plain_{width or len(x)}x{'_'.join(map(str, outs))}x{k}",
    )(x, *weights)


def _tile(outs: list[int], k: int) -> tuple[int, int, int]:
    """Return what was fastest on an H200, for one and two rows, at Flash's shapes."""
    n, bk = sum(outs), divisor(k, 4096)
    bn = 1 if n <= 512 else min(divisor(size, 2) for size in outs)
    return bn, bk, max(bk // (512 if n <= 1024 else 1024), 1)


def _kernel(
    x_ref,  # [R, In]
    *refs,  # of each weight [Out, In], then of each output [R, Out]
    bn, bk, width, interpret,
):  # fmt: skip
    weights, outs = refs[: len(refs) // 2], refs[len(refs) // 2 :]

    def multiply(weight, block):
        own = pl.ds(block * bn, bn)

        def add(step, sums):
            columns = pl.ds(step * bk, bk)
            w = read_once(weights[weight], (own, columns), interpret)
            w = w.astype(jnp.float32)
            return tuple(
                so_far + w * x_ref[row, columns].astype(jnp.float32)[None]
                for row, so_far in enumerate(sums)
            )

        zero = jnp.zeros((bn, bk), jnp.float32)
        steps = x_ref.shape[1] // bk
        sums = jax.lax.fori_loop(0, steps, add, (zero,) * width)
        write_rows(outs[weight], own, [jnp.sum(so_far, -1) for so_far in sums])

    for_own_weight([out_ref.shape[1] // bn for out_ref in outs], multiply)
