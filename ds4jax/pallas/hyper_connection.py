"""A hyper connection's reading of the streams, on NVIDIA GPUs, in two launches.

As XLA's own kernels it is nearly a hundred, most of them Sinkhorn's, each of a
microsecond: more than a layer's weights take to read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ds4jax.config import ModelConfig

_PARTS = 128
"""Into how many the sums over all streams are cut, whatever the number of rows."""


def serves(streams: Float[Array, "*rows M D"]) -> bool:
    """Say whether `read` is for streams of these sizes."""
    sizes = streams.shape[-2:]
    return all(size & (size - 1) == 0 for size in sizes) and sizes[1] >= _PARTS


def read(
    streams: Float[Array, "R M D"],
    fn: Float[Array, "F MD"],
    base: Float[Array, "F"],
    scale: Float[Array, "3"],
    norm: Float[Array, "D"],
    config: ModelConfig,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R D"], Float[Array, "R M"], Float[Array, "R M M"]]:
    """Return what `HyperConnection` does, a block's normed input and its weights.

    Args:
      streams: of some rows.
      fn, base, scale: the connection's weights; F = 2 M + M^2.
      norm: weight of the block's RMS norm.
      config: for the counts and the epsilons.
      width: how many rows, the first ones, are not copies of the last of these.
      interpret: without a GPU.
    """
    rows, m, d = streams.shape
    flat = streams.reshape(rows, m * d)
    size = pl.next_power_of_2(len(fn))
    call = functools.partial(pl.pallas_call, interpret=interpret)
    maps, squares = call(
        functools.partial(_maps_kernel, size=size, width=width or rows),
        grid=(_PARTS,),
        out_shape=(
            jax.ShapeDtypeStruct((_PARTS, rows, size), jnp.float32),
            jax.ShapeDtypeStruct((_PARTS, rows), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="hc_maps",
    )(flat, fn)
    return call(
        functools.partial(_mix_kernel, c=config, width=width or rows),
        grid=(rows, 2),
        out_shape=(
            jax.ShapeDtypeStruct((rows, d), jnp.float32),
            jax.ShapeDtypeStruct((rows, m), jnp.float32),
            jax.ShapeDtypeStruct((rows, m, m), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="hc_mix",
    )(streams, maps, squares, base, scale, norm)


def _maps_kernel(
    x_ref,  # [R, M D]
    fn_ref,  # [F, M D]
    maps_ref,  # [_PARTS, R, size]
    squares_ref,  # [_PARTS, R]
    *, size, width,
):  # fmt: skip
    part = pl.program_id(0)
    size_of_part = x_ref.shape[1] // _PARTS
    own = pl.ds(part * size_of_part, size_of_part)
    columns = part * size_of_part + jnp.arange(size_of_part)[None]
    places = jnp.minimum(jnp.arange(size), fn_ref.shape[0] - 1)[:, None]
    fn = fn_ref[places, columns].astype(jnp.float32)
    for row in range(width):
        x = x_ref[row, own]
        maps_ref[part, row, :] = jnp.sum(fn * x[None], -1)
        squares_ref[part, row] = jnp.sum(x * x)


def _mix_kernel(
    streams_ref,  # [R, M, D]
    maps_ref,  # [_PARTS, R, size]
    squares_ref,  # [_PARTS, R]
    base_ref,  # [F]
    scale_ref,  # [3]
    norm_ref,  # [D]
    out_ref,  # [R, D]
    post_ref,  # [R, M]
    mix_ref,  # [R, M, M]
    *, c, width,
):  # fmt: skip
    row = pl.program_id(0)
    read = jnp.minimum(row, width - 1)
    m, d = streams_ref.shape[1:]
    mean = jnp.sum(squares_ref[:, read]) / (m * d)
    inverse = 1 / jnp.sqrt(mean + c.rms_eps)

    def maps(which, place):
        parts = jnp.arange(_PARTS).reshape(_PARTS, *(1,) * place.ndim)
        total = jnp.sum(maps_ref[parts, read, place[None]], 0) * inverse
        return total * scale_ref[which] + base_ref[place]

    # Two programs a row, side by side: Sinkhorn's loop takes longest.
    @pl.when(pl.program_id(1) == 0)
    def _weights():
        each = jnp.arange(m)
        post_ref[row, :] = 2 * jax.nn.sigmoid(maps(1, m + each))
        logits = maps(2, 2 * m + jnp.arange(m * m))
        for place, value in enumerate(_sinkhorn(logits, m, c.sinkhorn_iters, c.hc_eps)):
            mix_ref[row, place // m, place % m] = value

    @pl.when(pl.program_id(1) == 1)
    def _input():
        streams = streams_ref[read, :, :]
        pre = jax.nn.sigmoid(maps(0, jnp.arange(m))) + c.hc_eps
        x = jnp.sum(pre[:, None] * streams, 0)
        mean = jnp.sum(x * x) / d
        out_ref[row, :] = x / jnp.sqrt(mean + c.rms_eps) * norm_ref[:]


def _sinkhorn(logits, m, iterations, eps):
    """Return the M^2 numbers of the matrix, each by itself.

    Every thread then computes all of them: sums along an axis of an array would have
    threads wait for each other forty times.
    """
    place = jnp.arange(m * m)
    cells = [jnp.sum(jnp.where(place == at, logits, 0)) for at in range(m * m)]
    rows = [range(m * i, m * i + m) for i in range(m)]
    columns = [range(j, m * m, m) for j in range(m)]

    def normalize(cells, lines, eps):
        scaled = list(cells)
        for line in lines:
            inverse = 1 / (sum(cells[at] for at in line) + eps)
            for at in line:
                scaled[at] = cells[at] * inverse
        return scaled

    def rows_then_columns(_, cells):
        return tuple(normalize(normalize(cells, rows, eps), columns, eps))

    for line in rows:
        peak = functools.reduce(jnp.maximum, [cells[at] for at in line])
        for at in line:
            cells[at] = jnp.exp(cells[at] - peak)
    cells = [cell + eps for cell in normalize(cells, rows, 0)]
    cells = tuple(normalize(cells, columns, eps))
    return jax.lax.fori_loop(0, iterations - 1, rows_then_columns, cells)
