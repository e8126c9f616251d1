"""Products of many rows' streams with a hyper connection's map, on NVIDIA GPUs.

A map has few rows and long ones, which suits no library's kernel.  Operands are cut
into three of bfloat16, exact together, so that matrix units multiply as float32 would.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_ROWS, _COLUMNS, _PARTS = 64, 32, 8
"""Rows and columns a program takes at a time; into how many parts columns are cut."""


def serves(x: Float[Array, "R N"]) -> bool:
    """Say whether `product` is for rows of these sizes."""
    rows, columns = x.shape
    return rows % _ROWS == 0 and columns % (_PARTS * _COLUMNS) == 0


def product(
    x: Float[Array, "R N"],
    fn: Float[Array, "F N"],
    eps: float,
    *,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """Return `rms(x, eps) @ fn.T`, float32."""
    rows, columns = x.shape
    size = max(pl.next_power_of_2(len(fn)), 16)
    sums, squares = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(_PARTS, rows // _ROWS),
        out_shape=(
            jax.ShapeDtypeStruct((_PARTS, rows, size), jnp.float32),
            jax.ShapeDtypeStruct((_PARTS, rows), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="stream_maps",
    )(x, fn)
    mean = jnp.sum(squares, 0) / columns
    return jnp.sum(sums, 0)[:, : len(fn)] / jnp.sqrt(mean + eps)[:, None]


def _kernel(
    x_ref,  # [R, N]
    fn_ref,  # [F, N]
    sums_ref,  # [_PARTS, R, size]
    squares_ref,  # [_PARTS, R]
    *, size,
):  # fmt: skip
    part, rows = pl.program_id(0), pl.ds(pl.program_id(1) * _ROWS, _ROWS)
    columns = x_ref.shape[1] // _PARTS
    places = jnp.minimum(jnp.arange(size), fn_ref.shape[0] - 1)[:, None]

    def add(step, so_far):
        sums, squares = so_far
        own = part * columns + step * _COLUMNS + jnp.arange(_COLUMNS)[None]
        x = x_ref[rows, pl.ds(part * columns + step * _COLUMNS, _COLUMNS)]
        fn = _three(fn_ref[places, own].astype(jnp.float32))
        for i, piece in enumerate(_three(x)):
            for other in fn[: 3 - i]:
                dims = (((1,), (1,)), ((), ()))
                sums += jax.lax.dot_general(
                    piece, other, dims, preferred_element_type=jnp.float32
                )
        return sums, squares + jnp.sum(x * x, -1)

    zero = jnp.zeros((_ROWS, size), jnp.float32), jnp.zeros(_ROWS, jnp.float32)
    sums, squares = jax.lax.fori_loop(0, columns // _COLUMNS, add, zero)
    sums_ref[part, rows, :] = sums
    squares_ref[part, rows] = squares


def _three(x: Array) -> list[Array]:
    """Return three arrays of bfloat16 whose sum is x, the largest first."""
    pieces = []
    for _ in range(3):
        pieces.append(x.astype(jnp.bfloat16))
        x = x - pieces[-1].astype(jnp.float32)
    return pieces
