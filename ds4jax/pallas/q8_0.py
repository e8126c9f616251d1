"""Products of a few rows with Q8_0 weights, on NVIDIA GPUs.

A program takes some rows of the weight and all rows of the activations, so a weight is
read once however many rows there are.  Each row's sum has one order, fixed by the
shape of the weight alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ds4jax.pallas.fixed_point import FixedPoint, dot, total
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
    n, scales = w.planes["d"].shape
    rows = len(x.words) // groups
    bn, bg, warps = tile or _tile(n, scales)
    out = pl.pallas_call(
        functools.partial(
            _kernel,
            bn=bn,
            bg=bg,
            width=width or rows,
            groups=groups,
            interpret=interpret,
        ),
        grid=(n // bn,),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"q8_0_{width or rows}x{n}x{32 * scales}",
    )(x.words, x.scale, w.planes["quants"].reshape(n, scales, 8), w.planes["d"])
    return out.reshape(rows, groups, n // groups)


def _tile(n: int, scales: int) -> tuple[int, int, int]:
    fitting = lambda size, most: min(size & -size, most)  # noqa: E731
    if n <= 2048:  # Few programs: each takes much at a time.
        return fitting(n, 2), fitting(scales, 128), 4
    return fitting(n, 4), fitting(scales, 32), 2


def _kernel(
    words_ref,  # [R * groups, limbs, In / 32, 8]
    scale_ref,  # [R * groups, In / 32]
    quants_ref,  # [N, In / 32, 8]
    d_ref,  # [N, In / 32]
    out_ref,  # [R, N]
    *, bn, bg, width, groups, interpret,
):  # fmt: skip
    n, scales = d_ref.shape
    own = pl.ds(pl.program_id(0) * bn, bn)
    group = pl.program_id(0) * bn // (n // groups)

    def add(step, sums):
        columns = pl.ds(step * bg, bg)
        quants = quants_ref[own, columns, :]
        d = d_ref[own, columns].astype(jnp.float32)
        added = []
        for row, so_far in enumerate(sums):
            at = row * groups + group
            limbs = [
                words_ref[at, limb, columns, :][None]
                for limb in range(words_ref.shape[1])
            ]
            parts = [jnp.sum(part, -1) for part in dot(quants, limbs, interpret)]
            scale = scale_ref[at, columns][None]
            added.append(so_far + total(parts) * (d * scale))
        return tuple(added)

    zero = jnp.zeros((bn, bg), jnp.float32)
    sums = jax.lax.fori_loop(0, scales // bg, add, (zero,) * width)
    results = [jnp.sum(so_far, -1) for so_far in sums]
    for row in range(out_ref.shape[0]):
        out_ref[row, own] = results[min(row, width - 1)]
