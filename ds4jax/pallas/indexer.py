"""The Lightning indexer's scores and their best, on NVIDIA GPUs, without a sort.

The keys are dealt to lists by turns, so that neighbours, which tend to score alike, are
in different ones.  A first kernel scores some lists a program and sorts each, by
counting.  The best of all are then in the first layers of the lists, and a second
kernel counts how many beat each of these: that is its place in the result.  How long
the lists are follows what a query sees, not what the cache holds.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_TILE = 64
"""Keys that a program scores; a list is no longer."""

_LISTS = 256
"""The fewest lists that there is room for."""

_PROGRAMS = 512
"""The most programs for the scores of a row."""

_COMPARED = 2048
"""Keys that are compared at a time: layers of all lists, of which few are needed."""

_NOTHING = np.int32(-(2**31))
"""Ranks below every score."""


def serves(query: Float[Array, "T I J"]) -> bool:
    """Say whether `best` is for queries of these sizes."""
    _, heads, width = query.shape
    whole = heads & (heads - 1) == 0 and width & (width - 1) == 0
    return whole and heads >= 16 and width >= 32


def best(
    query: Float[Array, "T I J"],
    share: Float[Array, "T I"],
    keys: Float[Array, "C J"],
    start: Int[Array, "1"],
    end: Int[Array, "1"],
    turn: tuple[Float[Array, "T J"], Float[Array, "T J"]],
    ratio: int,
    most: int,
    dtype: str,
    width: int | None = None,
    *,
    interpret: bool = False,
) -> Int[Array, "T N"]:
    """Return the indices of the `most` keys of the highest scores of those that exist.

    Best first, ties in the order of the keys; or, where no more than `most` exist, the
    numbers below `most`.

    Args:
      query: before rotation.
      share: of each head in a score.
      keys: rotated; one that does not exist is not read.
      start, end: positions of the first row and behind the last real one.
      turn: what rotates the rows' queries, of `model.rope.turn`, in every channel.
      ratio: positions for each key.
      most: N, at most C.
      dtype: operand type of the product.
      width: how many rows, the first ones, are not copies of the last of these.
      interpret: without a GPU.
    """
    rows, heads, size = query.shape
    width = width or rows
    lists = max(_LISTS, pl.next_power_of_2(len(keys)) // _TILE)
    layers = pl.next_power_of_2(pl.cdiv(len(keys), lists))
    seen = functools.partial(_seen, ratio=ratio, most=most, lists=lists, layers=layers)
    call = functools.partial(pl.pallas_call, interpret=interpret)
    in_lists = jax.ShapeDtypeStruct((width, layers * lists), jnp.int32)
    scores, index = call(
        functools.partial(_score_kernel, seen=seen, lists=lists, dtype=dtype),
        grid=(min(layers * lists // _TILE, _PROGRAMS), width),
        out_shape=(in_lists, in_lists),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name=f"index_scores_{heads}x{size}",
    )(start, end, query, share, keys, *turn)
    return call(
        functools.partial(_place_kernel, seen=seen, lists=lists, layers=layers),
        grid=(lists, width),
        out_shape=jax.ShapeDtypeStruct((rows, most), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        name=f"index_best_{most}",
    )(start, end, scores, index)


def _seen(start_ref, end_ref, *, ratio, most, lists, layers):
    """Return of a program's row keys, log2 of their layers, lists, if all are best."""
    last = jnp.minimum(start_ref[0] + pl.program_id(1) + 1, end_ref[0])
    count = jax.lax.div(last, ratio)
    level = sum(
        ((lists << i) < count).astype(jnp.int32) for i in range(layers.bit_length() - 1)
    )
    return count, jnp.int32(level), (count + (1 << level) - 1) >> level, count <= most


def _score_kernel(
    start_ref,  # [1]
    end_ref,  # [1]
    query_ref,  # [T, I, J]
    share_ref,  # [T, I]
    keys_ref,  # [C, J]
    cos_ref,  # [T, J]
    sin_ref,  # [T, J], negative for the first of a pair
    scores_ref,  # [width, layers * lists], of each list from the best
    index_ref,  # [width, layers * lists]
    *, seen, lists, dtype,
):  # fmt: skip
    count, level, used, is_all = seen(start_ref, end_ref)
    program, row = pl.program_id(0), pl.program_id(1)
    heads, size = query_ref.shape[1:]
    # A tile has `own` lists of 2^level keys.
    place = jnp.arange(_TILE)
    log_own = (_TILE.bit_length() - 1) - level
    member = place & ((1 << log_own) - 1)

    @pl.when(~is_all & ((program << log_own) < used))
    def _score():
        channel = jnp.arange(size)
        # From memory once more: to take pairs apart, threads would wait for each other.
        of_pair = query_ref[row, jnp.arange(heads)[:, None], (channel ^ 1)[None]]
        query = query_ref[row, :, :] * cos_ref[row, :] + of_pair * sin_ref[row, :]
        query = query.astype(dtype)
        share = share_ref[row, :] * (size * heads) ** -0.5

        def score(step, _):
            of_list = ((step * pl.num_programs(0) + program) << log_own) + member
            key = of_list + (place >> log_own) * used
            live = jnp.minimum(key, count - 1)[:, None]
            match = jax.lax.dot_general(
                keys_ref[live, channel[None]].astype(dtype),
                query,
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
                preferred_element_type=jnp.float32,
            )
            scores = ordered(jnp.sum(share[None] * jnp.maximum(match, 0), 1))
            scores = jnp.where(key < count, scores, _NOTHING)
            same_list = member[None] == member[:, None]
            beats = _beats(scores[None], key[None], scores[:, None], key[:, None])
            rank = jnp.sum((beats & same_list).astype(jnp.int32), 1)
            scores_ref[row, rank * lists + of_list] = scores
            index_ref[row, rank * lists + of_list] = key

        last = ((used - 1) >> log_own) - program
        steps = jax.lax.div(last, pl.num_programs(0)) + 1
        jax.lax.fori_loop(0, steps, score, None)


def ordered(score):
    """Return integers in the order of floats; all zeros of a row have one sign."""
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _beats(score, index, other, other_index):
    return (score > other) | ((score == other) & (index < other_index))


def _place_kernel(
    start_ref,  # [1]
    end_ref,  # [1]
    scores_ref,  # [width, layers * lists]
    index_ref,  # [width, layers * lists]
    out_ref,  # [T, N]
    *, seen, lists, layers,
):  # fmt: skip
    _, level, used, is_all = seen(start_ref, end_ref)
    program, row = pl.program_id(0), pl.program_id(1)
    (rows, most), width = out_ref.shape, len(scores_ref)
    filled = lists << level
    depth = min(max(_COMPARED // lists, 1), layers)
    chunk = depth * lists

    def write(rank, index):
        plgpu.store(out_ref.at[row, rank], index, mask=rank < most)
        for copy in range(width, rows):
            own = (rank < most) & (row == width - 1)
            plgpu.store(out_ref.at[copy, rank], index, mask=own)

    @pl.when(is_all)
    def _count_up():
        size = pl.next_power_of_2(pl.cdiv(most, lists))
        rank = program * size + jnp.arange(size)
        write(rank, rank)

    def take(flat):
        """Return scores and indices; nothing where there is none, or no list."""
        read = jnp.minimum(flat, layers * lists - 1)
        real = (flat < filled) & ((flat & (lists - 1)) < used)
        return jnp.where(real, scores_ref[row, read], _NOTHING), index_ref[row, read]

    def rank_of(score, index):
        """Count what beats them, or at least `most`."""

        def add(state):
            step, rank, _ = state
            others, their_index = take(step * chunk + jnp.arange(chunk))
            beats = _beats(
                others[None], their_index[None], score[:, None], index[:, None]
            )
            rank += jnp.sum(beats.astype(jnp.int32), 1)
            # Nothing beyond the next layer is better than its best.
            best_left = jnp.max(take((step + 1) * chunk + jnp.arange(lists))[0])
            unsure = (rank < most) & (score <= best_left)
            return step + 1, rank, jnp.max(unsure.astype(jnp.int32))

        def goes_on(state):
            step, _, unsure = state
            return (step * chunk < filled) & (unsure > 0)

        first = jnp.int32(0), jnp.zeros(score.shape, jnp.int32), jnp.int32(1)
        return jax.lax.while_loop(goes_on, add, first)[1]

    layer = jnp.arange(depth)

    def place(state):
        step, _ = state
        score, index = take((step * depth + layer) * lists + program)
        rank = rank_of(score, index)
        write(rank, index)
        chosen = (rank < most) & (layer == depth - 1)
        return step + 1, jnp.max(chosen.astype(jnp.int32))

    def goes_on(state):
        step, chosen = state
        return (step * chunk < filled) & (chosen > 0)

    @pl.when(~is_all & (program < used))
    def _place():
        jax.lax.while_loop(goes_on, place, (jnp.int32(0), jnp.int32(1)))
