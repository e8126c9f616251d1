"""A hyper connection's reading of the streams, on NVIDIA GPUs, in two launches.

As XLA's own kernels it is nearly a hundred, most of them Sinkhorn's, each of a
microsecond: more than a layer's weights take to read.  Sinkhorn has programs of its own
in the launch of the block's input.  Beside the block, which does not need it, it would
be in the way of programs that want whole multiprocessors.  A long pass has Sinkhorn's
alone from here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ds4jax.config import ModelConfig
from ds4jax.pallas.fixed_point import FixedPoint, Order, shapes, store

_PARTS = 128
"""Into how many the sums over all streams are cut, whatever the number of rows."""

_MIXED_WARPS = 4
"""Of the programs that compute a row's input or its weights: 8 take 5.6 us for 4.7."""

_ROWS = 32
"""Rows of a long pass whose matrices a program takes, one for each thread."""


Update = tuple[
    tuple[Float[Array, "R D"], ...], Float[Array, "R M"], Float[Array, "R M M"]
]
"""As `model.hyper.Update`, of one sequence."""


class Reading(NamedTuple):
    """What a hyper connection reads before a block.

    Attributes:
      streams: of some rows.
      update: what is to be merged into them first.
      fn, base, scale: the connection's weights; F = 2 M + M^2.
      norm: weight of the block's RMS norm.
      config: for the counts and the epsilons, and the type of operands.
    """

    streams: Float[Array, "R M D"]
    update: Update | None
    fn: Float[Array, "F MD"]
    base: Float[Array, "F"]
    scale: Float[Array, "3"]
    norm: Float[Array, "D"]
    config: ModelConfig


def serves(streams: Float[Array, "*rows M D"]) -> bool:
    """Say whether `read` is for streams of these sizes."""
    sizes = streams.shape[-2:]
    return all(size & (size - 1) == 0 for size in sizes) and sizes[1] >= _PARTS


def read(
    reading: Reading,
    orders: Sequence[Order],
    width: int | None = None,
    *,
    interpret: bool = False,
) -> tuple[
    Float[Array, "R D"],
    tuple[FixedPoint, ...],
    Float[Array, "R M D"],
    Float[Array, "R M"],
    Float[Array, "R M M"],
]:
    """Return what `HyperConnection` does: a block's normed input, streams and weights.

    After the input comes the same in fixed point, for operands of the config's type, in
    each of some orders.

    Args:
      reading: what is read.
      orders: of the input in fixed point.
      width: how many rows, the first ones, are not copies of the last of these.
      interpret: without a GPU.
    """
    streams, update, fn, base, scale, norm, config = reading
    rows, m, d = streams.shape
    width = width or rows
    size = pl.next_power_of_2(len(fn))
    call = functools.partial(pl.pallas_call, interpret=interpret)
    own = jax.ShapeDtypeStruct(streams.shape, jnp.float32)
    *merged, maps, squares = call(
        functools.partial(_maps_kernel, size=size, width=width),
        grid=(_PARTS,),
        out_shape=(
            *([own] if update else []),
            jax.ShapeDtypeStruct((_PARTS, rows, size), jnp.float32),
            jax.ShapeDtypeStruct((_PARTS, rows), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="hc_maps",
    )(streams, fn.reshape(-1, m, d), *jax.tree.leaves(update))
    (streams,) = merged or (streams,)
    fixed = [shapes(rows, d, config.dtype, order) for order in orders]
    x, post, mix, *fixed = call(
        functools.partial(
            _mixed_kernel, c=config, orders=orders, width=width, interpret=interpret
        ),
        grid=(2, rows),
        out_shape=(
            jax.ShapeDtypeStruct((rows, d), jnp.float32),
            jax.ShapeDtypeStruct((rows, m), jnp.float32),
            jax.ShapeDtypeStruct((rows, m, m), jnp.float32),
            *itertools.chain(*fixed),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=_MIXED_WARPS),
        name="hc_mixed",
    )(streams, maps, squares, base, scale, norm)
    found = zip(orders, *(fixed[i::3] for i in range(3)), strict=True)
    ordered = tuple(FixedPoint(*arrays, order=order) for order, *arrays in found)
    return x, ordered, streams, post, mix


def _maps_kernel(
    streams_ref,  # [R, M, D]
    fn_ref,  # [F, M, D]
    *refs,  # of an update parts [R, D], post [R, M], mix [R, M, M], and the merged
    # streams [R, M, D]; then maps [_PARTS, R, size] and squares [_PARTS, R]
    size, width,
):  # fmt: skip
    *refs, maps_ref, squares_ref = refs
    part, (rows, m, d) = pl.program_id(0), streams_ref.shape
    of_stream, size_of_part = _PARTS // m, m * d // _PARTS
    stream, first = part // of_stream, part % of_stream * size_of_part
    own = pl.ds(first, size_of_part)
    channels = first + jnp.arange(size_of_part)[None]
    places = jnp.minimum(jnp.arange(size), fn_ref.shape[0] - 1)[:, None]
    fn = fn_ref[places, stream, channels].astype(jnp.float32)
    found = [_merged(streams_ref, refs, row, stream, own) for row in range(width)]
    maps = [jnp.sum(fn * x[None], -1) for x in found]
    squares = [jnp.sum(x * x) for x in found]
    for row in range(rows):
        read = min(row, width - 1)
        maps_ref[part, row, :] = maps[read]
        squares_ref[part, row] = squares[read]
        if refs:
            refs[-1][row, stream, own] = found[read]


def _merged(streams_ref, refs, row, stream, own):
    """Return some channels of a stream of a row, as of `model.hyper.Update`."""
    if not refs:
        return streams_ref[row, stream, own]
    *parts, post_ref, mix_ref, _ = refs
    carried = sum(
        mix_ref[row, at, stream] * streams_ref[row, at, own]
        for at in range(streams_ref.shape[1])
    )
    output = functools.reduce(jnp.add, [part[row, own] for part in parts])
    return post_ref[row, stream] * output + carried


def _mixed_kernel(
    streams_ref,  # [R, M, D]
    maps_ref,  # [_PARTS, R, size]
    squares_ref,  # [_PARTS, R]
    base_ref,  # [F]
    scale_ref,  # [3]
    norm_ref,  # [D]
    out_ref,  # [R, D]
    post_ref,  # [R, M]
    mix_ref,  # [R, M, M]
    *fixed_refs,  # of the arrays of `shapes`, for each order
    c, orders, width, interpret,
):  # fmt: skip
    refs, row = (maps_ref, squares_ref, base_ref, scale_ref), pl.program_id(1)

    @pl.when(pl.program_id(0) == 0)
    def _():
        out = norm_ref, out_ref, *fixed_refs
        _input(streams_ref, refs, *out, row=row, c=c, orders=orders, width=width)

    @pl.when(pl.program_id(0) == 1)
    def _():
        count = math.prod(streams_ref.shape[1:])
        _weights(refs, post_ref, mix_ref, row, c, count, interpret)


def _input(
    streams_ref, refs, norm_ref, out_ref, *fixed_refs, row, c, orders, width
):  # fmt: skip
    """Write a row of the block's input."""
    read = jnp.minimum(row, width - 1)
    m, d = streams_ref.shape[1:]
    # On their way while the maps are added up.
    streams, norm = streams_ref[read, :, :], norm_ref[:]
    pre = jax.nn.sigmoid(_map(refs, row, 0, jnp.arange(m), c, m * d)) + c.hc_eps
    x = jnp.sum(pre[:, None] * streams, 0)
    mean = jnp.sum(x * x) / d
    x = x / jnp.sqrt(mean + c.rms_eps) * norm
    out_ref[row, :] = x
    for i, order in enumerate(orders):
        own = fixed_refs[3 * i : 3 * i + 3]
        store(own, x.reshape(-1, 2, 4, 4), row, 0, c.dtype, order)


def _weights(refs, post_ref, mix_ref, row, c, count, interpret):
    """Write a row's weights of the output and of the streams."""
    m = post_ref.shape[1]
    post = _map(refs, row, 1, m + jnp.arange(m), c, count)
    logits = _map(refs, row, 2, 2 * m + jnp.arange(m * m), c, count)
    post_ref[row, :] = 2 * jax.nn.sigmoid(post)
    # Numbers, not arrays: every thread then computes all of them, where sums along an
    # axis would have threads wait for each other forty times.
    wait = (lambda: None) if interpret else plgpu.debug_barrier
    at = jnp.arange(m * m)
    mix_ref[row, at // m, at % m] = logits
    wait()
    cells = [mix_ref[row, place // m, place % m] for place in range(m * m)]
    wait()
    for place, value in enumerate(_sinkhorn(cells, m, c.sinkhorn_iters, c.hc_eps)):
        mix_ref[row, place // m, place % m] = value


def _map(refs, row, which, place, c, count):
    """Return the maps at places [N] of a row, all of the map `which`."""
    maps_ref, squares_ref, base_ref, scale_ref = refs
    # All loads come before the first sum, for which threads wait.
    squares, parts = squares_ref[:, row], jnp.arange(_PARTS)[:, None]
    maps, scale = maps_ref[parts, row, place[None]], scale_ref[which]
    base = base_ref[place]
    inverse = 1 / jnp.sqrt(jnp.sum(squares) / count + c.rms_eps)
    return jnp.sum(maps, 0) * inverse * scale + base


def serves_sinkhorn(logits: Float[Array, "R M M"]) -> bool:
    """Say whether `sinkhorn` is for matrices of these sizes."""
    return len(logits) % _ROWS == 0


def sinkhorn(
    logits: Float[Array, "R M M"],
    iterations: int,
    eps: float,
    *,
    interpret: bool = False,
) -> Float[Array, "R M M"]:
    """Return `model.hyper.sinkhorn` of many matrices."""
    return pl.pallas_call(
        functools.partial(_sinkhorn_kernel, iterations=iterations, eps=eps),
        grid=(len(logits) // _ROWS,),
        out_shape=jax.ShapeDtypeStruct(logits.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="hc_sinkhorn",
    )(logits)


def _sinkhorn_kernel(
    logits_ref,  # [R, M, M]
    out_ref,  # [R, M, M]
    *, iterations, eps,
):  # fmt: skip
    rows, m = pl.ds(pl.program_id(0) * _ROWS, _ROWS), out_ref.shape[1]
    places = [(rows, place // m, place % m) for place in range(m * m)]
    cells = [logits_ref[place] for place in places]
    for place, value in zip(places, _sinkhorn(cells, m, iterations, eps), strict=True):
        out_ref[place] = value


def _sinkhorn(cells, m, iterations, eps):
    """Return the M^2 cells of the matrix, numbers or those of several matrices."""
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
