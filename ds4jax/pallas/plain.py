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
    dtype: str | None = None,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Float[Array, "R _"], ...]:
    """Return the products of rows with each of some weights, in one launch, float32.

    Args:
      x: the rows.
      weights: [Out, In], each with an Out of its own.
      width: how many rows to compute; the others' results are copies of the last of
        these.  All if not given.
      dtype: to which the rows are rounded, theirs if not given.
      interpret: without a GPU.
      tile: rows and columns that a program takes at a time, and its warps; by the
        weights' shapes if not given.
    """
    return _once(
        x, tuple(weights), width or len(x), dtype or str(x.dtype), interpret, tile
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _once(x, weights, width, dtype, interpret, tile):
    """Do what `matvecs` does; what a model asks for often is traced but once."""
    outs, k = [len(w) for w in weights], x.shape[1]
    bn, bk, warps = tile or _tile(outs, k)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            bn=bn,
            bk=bk,
            width=width,
            dtype=dtype,
            interpret=interpret,
        ),
        grid=(sum(n // bn for n in outs),),
        out_shape=tuple(jax.ShapeDtypeStruct((len(x), n), jnp.float32) for n in outs),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"plain_{width}x{'_'.join(map(str, outs))}x{k}",
    )(x, *weights)


_TILES = {
    512: (1, 4096, 8),
    1024: (2, 2048, 4),
    4096: (4, 1024, 4),
    np.inf: (2, 1024, 1),
}
"""Rows, columns and warps of a program, by the most rows of all weights together."""


def _tile(outs: list[int], k: int) -> tuple[int, int, int]:
    """Return what was fastest on an H200, for one and two rows, at Flash's shapes."""
    of_all = sum(outs)
    rows, columns, warps = next(t for most, t in _TILES.items() if of_all <= most)
    bk = divisor(k, columns)
    return min(divisor(n, rows) for n in outs), bk, max(warps * bk // columns, 1)


def _kernel(
    x_ref,  # [R, In]
    *refs,  # of each weight [Out, In], then of each output [R, Out]
    bn, bk, width, dtype, interpret,
):  # fmt: skip
    weights, outs = refs[: len(refs) // 2], refs[len(refs) // 2 :]

    def multiply(weight, block):
        own = pl.ds(block * bn, bn)

        def add(step, sums):
            columns = pl.ds(step * bk, bk)
            w = read_once(weights[weight], (own, columns), interpret)
            w = w.astype(jnp.float32)
            rows = [x_ref[row, columns].astype(dtype) for row in range(width)]
            return tuple(
                so_far + w * x.astype(jnp.float32)[None]
                for x, so_far in zip(rows, sums, strict=True)
            )

        zero = jnp.zeros((bn, bk), jnp.float32)
        steps = x_ref.shape[1] // bk
        sums = jax.lax.fori_loop(0, steps, add, (zero,) * width)
        write_rows(outs[weight], own, [jnp.sum(so_far, -1) for so_far in sums])

    for_own_weight([out_ref.shape[1] // bn for out_ref in outs], multiply)
