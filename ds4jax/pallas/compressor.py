"""A compressor behind its projections, on NVIDIA GPUs, in one launch or two.

As XLA's own kernels it is nine or ten, each of a microsecond.  A long window is pooled
by programs that have some channels each, and its row finished by one more launch.  The
ring and the finished rows are changed in place.  Nothing here depends on the width of
the pass: a finished row takes the pass's own inputs from where they were projected, all
others from the ring, and both are the same bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas import rope

_CHUNK = 16
"""Positions pooled at a time; more than those are pooled by several programs."""

_CHANNELS = 32
"""Of a finished row, that one of several programs pools."""

_LOWEST = -1e30
"""Below all gates, and finite: for places that have none."""


def serves(
    new: Float[Array, "T N"], inputs: Float[Array, "P 2 N"], ratio: int, width: int
) -> bool:
    """Say whether `compress` is for a compressor of these sizes.

    The ring has to hold what a pass writes beside all that it pools.  In narrower rows
    most threads of a program would have no channel.
    """
    rows, channels = new.shape
    whole = width & (width - 1) == 0 and ratio & (ratio - 1) == 0 and width >= 128
    return whole and len(inputs) >= rows + ratio * (channels // width)


def compress(
    value: Float[Array, "T N"],
    gate: Float[Array, "T N"],
    start: Int[Array, "1"],
    end: Int[Array, "1"],
    inputs: Float[Array, "P 2 N"],
    rows: Float[Array, "C K"],
    ape: Float[Array, "ratio N"],
    norm: Float[Array, "K"],
    frequencies: np.ndarray,
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "P 2 N"], Float[Array, "C K"]]:
    """Return the state of `model.compressor.Compressor` after a pass's rows.

    Args:
      value, gate: projections of the pass's rows; windows overlap if N is 2 K.
      start, end: positions of the first row and behind the last real one.
      inputs: ring of per-token inputs.
      rows: finished rows.
      ape: what is added to the gates, by the place in a window.
      norm: weight of the RMS norm.
      frequencies: of the rotation, as of `model.rope.rotate`.
      eps: epsilon of the norm.
      interpret: without a GPU.
    """
    ratio, width = len(ape), rows.shape[1]
    windows = -(-len(value) // ratio)
    turns = jnp.asarray(rope.spread(frequencies, width))
    call = functools.partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
    )
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (inputs, rows)]
    is_long = ratio * (value.shape[1] // width) > _CHUNK
    programs = width // _CHANNELS if is_long else 1
    operands = start, end, norm, turns, value, gate, ape, inputs, rows
    kept = len(operands) - 2
    inputs, rows = call(
        functools.partial(_kernel, windows=windows, programs=programs, eps=eps),
        grid=(windows * programs + len(value),),
        out_shape=tuple(shapes),
        input_output_aliases={kept: 0, kept + 1: 1},
        name=f"compress_{ratio}x{width}",
    )(*operands)
    if programs > 1:
        rows = call(
            functools.partial(_end_kernel, ratio=ratio, eps=eps),
            grid=(windows,),
            out_shape=shapes[1],
            input_output_aliases={4: 0},
            name=f"compress_{ratio}x{width}_end",
        )(*operands[:4], rows)
    return inputs, rows


def _kernel(
    start_ref,  # [1]
    end_ref,  # [1]
    norm_ref,  # [K]
    turns_ref,  # [K / 2]
    value_ref,  # [T, N]
    gate_ref,  # [T, N]
    ape_ref,  # [ratio, N]
    ring_ref,  # [P, 2, N]
    _rows_ref,  # [C, K]
    inputs_ref,  # [P, 2, N], the ring again
    rows_ref,  # [C, K]
    *, windows, programs, eps,
):  # fmt: skip
    start, end = start_ref[0], end_ref[0]
    size, _, channels = ring_ref.shape
    ratio, (capacity, width) = len(ape_ref), rows_ref.shape
    program = pl.program_id(0)
    row = program - windows * programs
    position = start + row

    @pl.when((row >= 0) & (position < end))
    def _keep():
        slot = jax.lax.rem(position, size)
        ape = ape_ref[jax.lax.rem(position, ratio), :].astype(jnp.float32)
        inputs_ref[slot, 0, :] = value_ref[row, :]
        inputs_ref[slot, 1, :] = gate_ref[row, :] + ape

    index, ends = _window(start, end, ratio, program // programs, capacity)
    # Of the row's channels.
    own = width // programs
    channel = program % programs * own

    @pl.when((row < 0) & ends)
    def _pool():
        overlap = channels - width
        first = index * ratio - (ratio if overlap else 0)
        pooled = ratio * (channels // width)
        chunk = min(_CHUNK, pooled)

        def add(step, so_far):
            begin = first + step * chunk
            positions = begin + jnp.arange(chunk)
            # The previous window speaks through the first half of the channels.
            shift = jnp.where(positions >= index * ratio, overlap, 0)
            column = shift[:, None] + channel + jnp.arange(own)[None]
            exists = (positions >= 0)[:, None]
            at = jnp.maximum(positions, 0)[:, None]
            slot = jax.lax.rem(at, size)
            kept = ring_ref[slot, 0, column], ring_ref[slot, 1, column]

            def with_new():
                new, place = jnp.maximum(at - start, 0), jax.lax.rem(at, ratio)
                ape = ape_ref[place, column].astype(jnp.float32)
                found = value_ref[new, column], gate_ref[new, column] + ape
                is_new = (positions >= start)[:, None]
                return tuple(map(functools.partial(jnp.where, is_new), found, kept))

            # Few of a long window's chunks have rows of the pass, and reading is slow.
            has_new = begin + chunk > start
            value, gate = jax.lax.cond(has_new, with_new, lambda: kept)
            value, gate = jnp.where(exists, value, 0), jnp.where(exists, gate, -jnp.inf)

            peak, total, summed = so_far
            higher = jnp.maximum(peak, gate)
            weight, shrink = jnp.exp(gate - higher), jnp.exp(peak - higher)
            return higher, total * shrink + weight, summed * shrink + weight * value

        # Each place of a chunk by itself: threads wait for each other at the end only.
        zero = jnp.zeros((chunk, own), jnp.float32)
        none = zero + _LOWEST, zero, zero
        peak, total, summed = jax.lax.fori_loop(0, pooled // chunk, add, none)
        share = jnp.exp(peak - jnp.max(peak, 0)[None])
        found = jnp.sum(summed * share, 0) / jnp.sum(total * share, 0)
        if programs == 1:
            found = _finished(found, index, ratio, norm_ref, turns_ref, eps)
        rows_ref[index, pl.ds(channel, own)] = found


def _end_kernel(
    start_ref,  # [1]
    end_ref,  # [1]
    norm_ref,  # [K]
    turns_ref,  # [K / 2]
    pooled_ref,  # [C, K]
    rows_ref,  # [C, K], the same again
    *, ratio, eps,
):  # fmt: skip
    place = start_ref[0], end_ref[0], ratio, pl.program_id(0)
    index, ends = _window(*place, len(rows_ref))

    @pl.when(ends)
    def _end():
        row = pooled_ref[index, :]
        rows_ref[index, :] = _finished(row, index, ratio, norm_ref, turns_ref, eps)


def _window(start, end, ratio, number, capacity):
    """Return the index of one of a pass's windows, and whether its row is made."""
    index = jax.lax.div(start, ratio) + number
    return index, (index < jax.lax.div(end, ratio)) & (index < capacity)


def _finished(row, index, ratio, norm_ref, turns_ref, eps):
    """Return a pooled row normed and rotated."""
    row = row / jnp.sqrt(jnp.sum(row * row) / len(row) + eps) * norm_ref[:]
    angle = (index * ratio).astype(jnp.float32) * turns_ref[:]
    return rope.rotate(row, jnp.cos(angle), jnp.sin(angle))
