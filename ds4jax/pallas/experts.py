"""Products of rows with the experts they chose, on NVIDIA GPUs: Q2_K, Q4_K, IQ2_XXS.

A program takes some rows of one expert's weight and one row of activations.  Programs
run in the order of the weight's rows, so what two rows read of one expert lies in the
cache for the second.  A pair's sum has one order, fixed by the weight's shape alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.pallas.fixed_point import FixedPoint, dot, total
from ds4jax.quant import QuantTensor

_MAGNITUDES = np.ascontiguousarray(
    IQ2_GRID.astype(np.int8).view("<u4").reshape(256, 2).T
)


def matvec(
    x: FixedPoint,
    w: QuantTensor,
    expert_ids: Int[Array, "R U"],
    width: int | None = None,
    *,
    interpret: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Float[Array, "R U Out"]:
    """Return the product of each row, or of R U rows in turn, with its U experts.

    Args:
      x: R or R * U rows of In.
      w: [E, Out, In], of Q2_K, Q4_K or IQ2_XXS.
      expert_ids: of each row.
      width: for how many of the R rows to compute; the others' results are copies of
        the last of these.  All if not given.
      interpret: without a GPU.
      tile: rows and units of columns that a program takes at a time, and its warps: 64
        columns of Q2_K, 32 of the others are a unit.
    """
    kernel, arrange, default = _KERNELS[w.format]
    n = w.shape[1]
    rows, each = expert_ids.shape
    bn, units, warps = tile or default
    operands = arrange(x, w)
    size = operands[-1].shape[2]
    bn, units = min(bn, n & -n), min(units, size & -size)
    pairs = rows * each
    out = pl.pallas_call(
        functools.partial(
            kernel, bn=bn, units=units, each=pairs // len(x.scale), interpret=interpret,
            copies=[pairs - each * (width or rows), each],
        ),
        grid=(each * (width or rows), n // bn),
        out_shape=jax.ShapeDtypeStruct((pairs, n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name=f"{w.format.lower()}_{each * (width or rows)}x{n}x{w.shape[-1]}",
    )(expert_ids.reshape(-1), *operands)  # fmt: skip
    return out.reshape(rows, each, n)


def _store(out_ref, own, sums, copies):
    """Write a pair's result, and again for each row that is a copy of its row."""
    pair = pl.program_id(0)
    total, each = jnp.sum(sums, -1), copies[1]
    out_ref[pair, own] = total

    if copies[0]:

        @pl.when(pair >= pl.num_programs(0) - each)
        def _copy():
            for more in range(each, copies[0] + each, each):
                out_ref[pair + more, own] = total


def _arrange_k(*scale_planes: str) -> Callable:
    """Return what names the operands of a K-quant's kernel in its order."""

    def arrange(x: FixedPoint, w: QuantTensor) -> list[Array]:
        planes = w.planes
        quants = planes["quants"]
        return [
            x.words,
            x.scale,
            x.sums,
            planes["d"],
            planes["dmin"],
            *(planes[name] for name in scale_planes),
            quants.reshape(*quants.shape[:-1], -1, 4),
        ]

    return arrange


def _k_kernel(
    ids_ref,  # [R U]
    words_ref,  # [rows, limbs, G, 8]
    scale_ref,  # [rows, G]
    sums_ref,  # [rows, G, 2]
    d_ref,  # [E, N, B]
    dmin_ref,  # [E, N, B]
    *refs,  # of scales, as `read` takes them; quants [E, N, C, 4]; out [R U, N]
    bn, units, each, copies, interpret, bits, read,
):  # fmt: skip
    *scale_refs, quants_ref, out_ref = refs
    pair, levels = pl.program_id(0), 8 // bits
    row, expert = pair // each, ids_ref[pair]
    own = pl.ds(pl.program_id(1) * bn, bn)
    chunks, blocks = quants_ref.shape[2], d_ref.shape[2]
    places = jnp.arange(bn)[:, None] + pl.program_id(1) * bn

    def add(step, so_far):
        chunk = step * units + jnp.arange(units)
        quants = quants_ref[expert, own, pl.ds(step * units, units), :]
        scales = read(scale_refs, expert, places, chunk[None])
        product = minimum = jnp.zeros((bn, units), jnp.float32)
        for level, (scale, least) in enumerate(scales):
            # 16 bytes hold a half of each of `levels` groups.
            group, half = chunk // 2 * levels + level, chunk % 2
            w = (quants >> (bits * level)) & (0x01010101 * (2**bits - 1))
            word = half[:, None] * 4 + jnp.arange(4)[None]
            limbs = [
                words_ref[row, limb, group[:, None], word][None]
                for limb in range(words_ref.shape[1])
            ]
            parts = [jnp.sum(p, -1) * scale for p in dot(w, limbs, interpret)]
            product += total(parts) * scale_ref[row, group][None]
            minimum += least.astype(jnp.float32) * sums_ref[row, group, half][None]
        block = chunk[None] // (chunks // blocks)
        d = d_ref[expert, places, block].astype(jnp.float32)
        dmin = dmin_ref[expert, places, block].astype(jnp.float32)
        return so_far + (d * product - dmin * minimum)

    zero = jnp.zeros((bn, units), jnp.float32)
    sums = jax.lax.fori_loop(0, chunks // units, add, zero)
    _store(out_ref, own, sums, copies)


def _read_q2_k(refs, expert, places, chunk):
    (ref,) = refs
    packed = ref[expert, places, chunk].astype(jnp.int32)
    return [
        ((packed >> (8 * level)) & 15, (packed >> (8 * level + 4)) & 15)
        for level in range(4)
    ]


def _read_q4_k(refs, expert, places, chunk):
    at = lambda level: (expert, places, chunk // 2 * 2 + level)  # noqa: E731
    return [
        tuple(ref[at(level)].astype(jnp.int32) for ref in refs) for level in range(2)
    ]


def _arrange_iq2(x: FixedPoint, w: QuantTensor) -> list[Array]:
    planes = w.planes
    words = jnp.moveaxis(x.words, -1, -2)
    tables = jnp.asarray(_MAGNITUDES)
    return [words, x.scale, tables, planes["d"], planes["signs"], planes["grid"]]


def _iq2_kernel(
    ids_ref,  # [P]
    words_ref,  # [R, limbs, 8, G]
    scale_ref,  # [R, G]
    tables_ref,  # [2, 256]: the first and the last four magnitudes of a grid row
    d_ref,  # [E, N, B]
    signs_ref,  # [E, N, G]
    grid_ref,  # [E, N, G]
    out_ref,  # [P, N]
    *, bn, units, each, copies, interpret,
):  # fmt: skip
    pair = pl.program_id(0)
    row, expert = pair // each, ids_ref[pair]
    own = pl.ds(pl.program_id(1) * bn, bn)
    groups = grid_ref.shape[2]
    places = jnp.arange(bn)[:, None] + pl.program_id(1) * bn

    def add(step, so_far):
        columns = pl.ds(step * units, units)
        grid = grid_ref[expert, own, columns]
        signs = signs_ref[expert, own, columns]
        sums = [jnp.zeros((bn, units), jnp.int32)] * (words_ref.shape[1] - 1)
        for four in range(4):
            index = ((grid >> (8 * four)) & 255).astype(jnp.int32)
            negative = _signs((signs >> (7 * four)) & 127)
            for half in range(2):
                magnitude = tables_ref[half, index]
                # A bit to each byte, as its lowest; then two's complement bytewise.
                bit = ((negative >> (4 * half)) & 15) * 0x00204081 & 0x01010101
                w = (magnitude ^ (bit * 255)) + bit
                limbs = [
                    words_ref[row, limb, 2 * four + half, columns][None]
                    for limb in range(words_ref.shape[1])
                ]
                parts = dot(w, limbs, interpret)
                sums = [a + b for a, b in zip(sums, parts, strict=True)]
        scale = scale_ref[row, columns][None]
        scale = (0.5 + (signs >> 28).astype(jnp.float32)) * 0.25 * scale
        block = (step * units + jnp.arange(units)[None]) // (groups // d_ref.shape[2])
        d = d_ref[expert, places, block].astype(jnp.float32)
        return so_far + total(sums) * (d * scale)

    zero = jnp.zeros((bn, units), jnp.float32)
    sums = jax.lax.fori_loop(0, groups // units, add, zero)
    _store(out_ref, own, sums, copies)


def _signs(seven: Array) -> Array:
    """Return eight signs of seven: the last makes the number of negatives even."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    return seven | ((parity ^ (parity >> 1)) & 1) << 7


_KERNELS = {
    "Q2_K": (
        functools.partial(_k_kernel, bits=2, read=_read_q2_k),
        _arrange_k("scales"),
        (8, 32, 4),
    ),
    "Q4_K": (
        functools.partial(_k_kernel, bits=4, read=_read_q4_k),
        _arrange_k("scales", "mins"),
        (8, 32, 4),
    ),
    "IQ2_XXS": (_iq2_kernel, _arrange_iq2, (16, 128, 8)),
}

FORMATS = tuple(_KERNELS)
"""The ggml types that `matvec` multiplies."""
