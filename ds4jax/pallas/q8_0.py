"""Products of a few rows with Q8_0 weights, on NVIDIA GPUs.

A program takes some rows of the weight and all rows of the activations, so a weight is
read once however many rows there are.  Each row's sum has one order, fixed by the
shape of the weight alone.

On an H200 the LM head takes 131 us for one row, 4096 x 8192 10.7 us; in Mosaic GPU, by
TMA, the same products took 127 and 10.5 us (benchmarks/NOTES.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ds4jax.pallas.dense import divisor, for_own_weight, read_once, write_rows
from ds4jax.pallas.fixed_point import (
    GROUP,
    FixedPoint,
    Order,
    dot,
    shapes,
    store,
    total,
)
from ds4jax.quant import QuantTensor


def matvec(
    x: FixedPoint,
    w: QuantTensor,
    groups: int = 1,
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Float[Array, "R groups Out"]:
    """Return the products of rows with a Q8_0 weight, float32.

    Args:
      x: R * groups rows of In, the parts of a row for its groups one after the other.
      w: [groups * Out, In]; its rows belong to groups in turn.
      groups: into how many parts the weight and each row are cut.
      width: how many of the R rows to compute; the others' results are copies of the
        last of these.  All if not given.
      interpret: without a GPU.
      tile: rows and groups of 32 columns that a program takes at a time, and its warps;
        by the weight's shape if not given.
    """
    (out,) = _matvecs(x, [w], groups, width, interpret, tile)
    return out.reshape(len(out), groups, -1)


def serves_fixed(w: QuantTensor, groups: int) -> bool:
    """Say whether `matvec_fixed` is for a weight of this shape."""
    return len(w.planes["d"]) // groups % GROUP == 0


def matvec_fixed(
    x: FixedPoint,
    w: QuantTensor,
    groups: int,
    dtype: str,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> FixedPoint:
    """Return `matvec`, all of a row side by side, for products of operands of `dtype`.

    A program takes as many rows of the weight as share a scale, so the next product
    needs no launch in between to put its operands into fixed point.

    Args:
      x, w, groups, interpret: as of `matvec`.
      dtype: one of LIMBS.
      width: how many of the R rows to compute; there is nothing in the others' places.
        All if not given.
    """
    bg = divisor(x.scale.shape[1], 32)
    tile = GROUP, bg, max(bg // 4, 1)
    found = _matvecs(x, [w], groups, width, interpret, tile, dtype)
    return FixedPoint(*found)


def matvecs(
    x: FixedPoint,
    weights: Sequence[QuantTensor],
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Float[Array, "R _"], ...]:
    """Return the products of rows with each of some Q8_0 weights, in one launch.

    Args:
      x: R rows of In.
      weights: [Out, In], each with an Out of its own.
      width, interpret, tile: as of `matvec`; `tile` by the shapes of all.
    """
    return _matvecs(x, tuple(weights), 1, width, interpret, tile)


# Traced once for all weights of the same shapes.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6), inline=True)
def _matvecs(x, weights, groups, width, interpret, tile, dtype=None):
    outs = [len(w.planes["d"]) for w in weights]
    scales = x.scale.shape[1]
    rows = len(x.words) // groups
    bn, bg, warps = tile or _tile(outs, groups, scales)
    planes = [
        plane
        for w in weights
        for plane in (w.planes["quants"].reshape(-1, scales, 2, 4), w.planes["d"])
    ]
    words = x.words.reshape(*x.words.shape[:3], 2, 4)
    if dtype:
        out_shape = shapes(rows, outs[0], dtype, Order())
    else:
        out_shape = tuple(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in outs)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            bn=bn,
            bg=bg,
            width=width or rows,
            groups=groups,
            dtype=dtype,
            interpret=interpret,
        ),
        grid=(sum(n // bn for n in outs),),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"q8_0_{width or rows}x{'_'.join(map(str, outs))}x{32 * scales}",
    )(words, x.scale, *planes)


def _tile(outs: list[int], groups: int, scales: int) -> tuple[int, int, int]:
    """Return what was fastest on an H200, for one and two rows, at Flash's shapes."""
    n, bn = sum(outs), min(divisor(n // groups, 4) for n in outs)
    if n > 65536:
        return bn, divisor(scales, 8), 1
    bg = divisor(scales, 128 if n <= 2048 else 64)
    return bn, bg, max(bg // 16, 1)


def _kernel(
    words_ref,  # [R * groups, limbs, In / 32, 2, 4]
    scale_ref,  # [R * groups, In / 32]
    *refs,  # of each weight quants [Out, In / 32, 2, 4] and d [Out, In / 32], then of
    # each output [R, Out], or of the arrays of a `FixedPoint` of the only one's `dtype`
    bn, bg, width, groups, dtype, interpret,
):  # fmt: skip
    weights = 1 if dtype else len(refs) // 3
    outs = refs[2 * weights :]

    def multiply(weight, block):
        quants_ref, d_ref = refs[2 * weight : 2 * weight + 2]
        own, half = pl.ds(block * bn, bn), slice(None)
        group = block * bn // (d_ref.shape[0] // groups)

        def add(step, sums):
            columns = pl.ds(step * bg, bg)
            quants = read_once(quants_ref, (own, columns, half, half), interpret)
            d = d_ref[own, columns].astype(jnp.float32)
            added = []
            for row, so_far in enumerate(sums):
                at = row * groups + group
                limbs = [
                    words_ref[at, limb, columns, :, :][None]
                    for limb in range(words_ref.shape[1])
                ]
                scale = scale_ref[at, columns][None]
                parts = [jnp.sum(p, -1) for p in dot(quants, limbs, interpret)]
                added.append(so_far + total(parts) * (d * scale))
            return tuple(added)

        zero = jnp.zeros((bn, bg), jnp.float32)
        steps = d_ref.shape[1] // bg
        sums = jax.lax.fori_loop(0, steps, add, (zero,) * width)
        found = [jnp.sum(so_far, -1) for so_far in sums]
        if not dtype:
            write_rows(outs[weight], own, found)
            return
        for row, values in enumerate(found):
            store(outs, values.reshape(1, 2, 4, 4), row, block, dtype, Order())

    of_each = [refs[2 * weight].shape[0] // bn for weight in range(weights)]
    for_own_weight(of_each, multiply)
