"""Attention and its output's maps in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_kernels_test import read
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.model.attention import Source, attend
from ds4jax.model.layers import rms
from ds4jax.model.rope import frequencies, rotate, turn
from ds4jax.pallas import attn_out, two_maps_program
from ds4jax.pallas.fixed_point import FixedPoint, Order
from ds4jax.pallas.q8_arithmetic import WARPS
from ds4jax.quant import QuantTensor, dequantize

ROWS, WRITTEN = 2, 3
EPS = 1e-6
TURNED = 32
same = np.testing.assert_array_equal


class Sizes(NamedTuple):
    heads: int
    width: int
    groups: int
    middle: int
    out: int


SMALL = Sizes(16, 256, 4, 1024, 32)


@functools.cache
def weights(sizes: Sizes) -> tuple[QuantTensor, QuantTensor]:
    columns = sizes.heads // sizes.groups * sizes.width
    return (
        synthetic.blocks(jax.random.key(0), "Q8_0", (sizes.middle, columns)),
        synthetic.blocks(jax.random.key(1), "Q8_0", (sizes.out, sizes.middle)),
    )


@functools.cache
def drawn(sizes: Sizes, window: int, used: int):
    """Queries, sources, sinks and the positions of WRITTEN rows."""
    draw = np.random.default_rng(2)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    query = normal(WRITTEN, sizes.heads, sizes.width)
    seen = draw.random((WRITTEN, window)) < 0.4
    # Nothing of a part, and what nobody may see.
    seen[1, :32], seen[:, 7] = False, False
    raw = normal(window, sizes.width).at[7].set(jnp.nan)
    sources = [(raw, jnp.asarray(seen), None)]
    if used:
        picked = draw.random((WRITTEN, used)) < 0.4
        compressed = normal(96, sizes.width).at[48:].set(jnp.nan)
        index = jnp.asarray(draw.integers(48, size=(WRITTEN, used)), jnp.int32)
        index = jnp.where(picked, index, 50)
        sources.append((compressed, jnp.asarray(picked), index))
    return query, sources, normal(sizes.heads), jnp.arange(WRITTEN)[None] * 37


def run(sizes: Sizes, window: int, used: int, rows: int, programs: int):
    """Return what heads make of it, in fixed point, and the result."""
    query, sources, sinks, positions = drawn(sizes, window, used)
    config = models.micro_config(rope_dim=TURNED, index_dim=TURNED)
    table = frequencies(config, compressed=False)
    turned = turn(positions[0], table)
    query = query.at[rows:].set(jnp.nan)
    first, second = weights(sizes)
    s = attn_out.shape(
        query, sources, TURNED, EPS, first, second, sizes.groups, "bfloat16", rows,
        programs,
    )  # fmt: skip
    given = attn_out.operands(s, query, sources, sinks, turned, first, second)
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in attn_out.written(s)
    ]
    operands = [*map(np.array, given), *written]
    Machine(two_maps_program.program(s), operands, s.shared, WARPS).run(programs, rows)
    same(operands[s.operands.index("counters")], 0)
    found = dict(zip(s.operands[len(given) :], written, strict=False))
    scale = found["scale"]
    arrays = found["words"], scale, np.zeros((*scale.shape, 2), np.float32)
    heads = FixedPoint(*map(jnp.asarray, arrays), order=Order())
    value = read(heads)[0].reshape(rows, sizes.heads, sizes.width)
    ready = rotate(rms(query[None], EPS), positions[..., None], table)
    named = [Source(*jax.tree.map(lambda a: a[None], source)) for source in sources]
    expected = attend(ready, [source.seen() for source in named], sinks, "bfloat16")
    expected = rotate(expected, positions[..., None], table, inverse=True)[0]
    return value, found["out"], expected[:rows]


@pytest.mark.parametrize("window, used, programs", [(48, 72, 5), (96, 0, 20)])
def test_programs_attend(window, used, programs):
    value, out, expected = run(SMALL, window, used, ROWS, programs)
    np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-2)
    first, second = (np.asarray(dequantize(w), np.float64) for w in weights(SMALL))
    grouped = value.reshape(ROWS, SMALL.groups, 1, -1)
    of_group = first.reshape(SMALL.groups, -1, first.shape[1])
    middle = (grouped @ of_group.swapaxes(1, 2)).reshape(ROWS, -1)
    np.testing.assert_allclose(out[:ROWS], middle @ second.T, rtol=0, atol=2.0**-8 * np.abs(middle @ second.T).max())
    same(out[ROWS:], np.repeat(out[ROWS - 1][None], WRITTEN - ROWS, 0))
