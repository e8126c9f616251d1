"""The rows that attention keeps, normed, rotated and put in their ring, on NVIDIA GPUs.

One launch in place, a program for each row.  As XLA's own kernels it is two that wait
for each other, 3.5 us of an H200 for 2.1, and attention waits for both.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from ds4jax.pallas import rope
from ds4jax.pallas.attention import Turn


def serves(row: Float[Array, "T K"], ring: Float[Array, "P K"]) -> bool:
    """Say whether `keep` is for rows of this width, and a ring with room for them."""
    rows, width = row.shape
    return width & (width - 1) == 0 and width >= 128 and rows <= len(ring)


def keep(
    row: Float[Array, "T K"],
    start: Int[Array, "1"],
    end: Int[Array, "1"],
    ring: Float[Array, "P K"],
    norm: Float[Array, "K"],
    turn: Turn,
    eps: float,
    *,
    interpret: bool = False,
) -> Float[Array, "P K"]:
    """Return the ring after a pass's rows.

    Args:
      row: of each of them, neither normed nor rotated yet.
      start, end: positions of the first row and behind the last real one.
      ring: the row of position t is in slot t mod P.
      norm: weight of the RMS norm.
      turn: their rotation.
      eps: epsilon of the norm.
      interpret: without a GPU.
    """
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(len(row),),
        out_shape=jax.ShapeDtypeStruct(ring.shape, ring.dtype),
        input_output_aliases={6: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=f"keep_{row.shape[1]}",
    )(start, end, norm, *turn, row, ring)


def _kernel(
    start_ref,  # [1]
    end_ref,  # [1]
    norm_ref,  # [K]
    cos_ref,  # [T, R]
    sin_ref,  # [T, R]
    row_ref,  # [T, K]
    _ring_ref,  # [P, K]
    ring_ref,  # [P, K], the same again
    *, eps,
):  # fmt: skip
    number = pl.program_id(0)
    position = start_ref[0] + number
    width = row_ref.shape[1]
    channel = jnp.arange(width)

    @pl.when(position < end_ref[0])
    def _keep():
        row = row_ref[number, :]
        root = jnp.sqrt(jnp.sum(row * row) / width + eps)

        def normed(channel):
            return row_ref[number, channel] / root * norm_ref[channel]

        cos, sin = rope.angles((cos_ref, sin_ref), number, channel, width)
        # The other channel of each pair is that whose number differs in a bit.
        kept = normed(channel) * cos + normed(channel ^ 1) * sin
        ring_ref[jax.lax.rem(position, len(ring_ref)), :] = kept
