"""Attention and its output's maps in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hopper
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_kernels_test import read
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.config import ModelConfig
from ds4jax.model.attention import Attention, Source, attend
from ds4jax.model.layers import rms
from ds4jax.model.rope import frequencies, rotate, turn
from ds4jax.pallas import attn_out, ptx, two_maps_program
from ds4jax.pallas.fixed_point import FixedPoint, Order
from ds4jax.pallas.passes import DecodePass, within
from ds4jax.pallas.q8_arithmetic import SLOT, WARPS
from ds4jax.pallas.two_maps_shape import Shape
from ds4jax.quant import dequantize

ROWS, WRITTEN = 2, 3
EPS = 1e-6
TURNED = 32
WINDOW, USED = 48, 72
same = np.testing.assert_array_equal


class Sizes(NamedTuple):
    heads: int
    width: int
    groups: int
    middle: int
    out: int


SMALL = Sizes(32, 256, 8, 1024, 32)
FLASH = Sizes(64, 512, 8, 8192, 4096)


def maps(sizes: Sizes, dtype: str = "bfloat16") -> attn_out.Maps:
    columns = sizes.heads // sizes.groups * sizes.width
    first, second = (
        synthetic.blocks(jax.random.key(i), "Q8_0", shape)
        for i, shape in enumerate([(sizes.middle, columns), (sizes.out, sizes.middle)])
    )
    return attn_out.Maps(first, second, sizes.groups, dtype)


own_maps = functools.cache(maps)


@functools.cache
def drawn(window: int, used: int) -> tuple:
    """Return queries, sources, sinks and the positions of WRITTEN rows."""
    draw = np.random.default_rng(2)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    query = normal(WRITTEN, SMALL.heads, SMALL.width)
    seen = draw.random((WRITTEN, window)) < 0.4
    # Nothing of a part, and what nobody may see.
    seen[1, :32], seen[:, 7] = False, False
    raw = normal(window, SMALL.width).at[7].set(jnp.nan)
    sources: list[tuple] = [(raw, jnp.asarray(seen), None)]
    if used:
        picked = draw.random((WRITTEN, used)) < 0.4
        compressed = normal(96, SMALL.width).at[48:].set(jnp.nan)
        index = draw.integers(48, size=(WRITTEN, used), dtype=np.int32)
        index = jnp.where(picked, index, draw.choice([-1, 50, 2**30], picked.shape))
        sources.append((compressed, jnp.asarray(picked), index.astype(jnp.int32)))
    return query, sources, normal(SMALL.heads), jnp.arange(WRITTEN)[None] * 37


def table() -> np.ndarray:
    config = models.micro_config(rope_dim=TURNED, index_dim=TURNED)
    return frequencies(config, compressed=False)


@functools.cache
def run(window: int, used: int, rows: int, programs: int):
    """Return what heads make of it, and the result; rows not computed are NaNs."""
    query, sources, sinks, positions = drawn(window, used)
    query, turned = query.at[rows:].set(jnp.nan), turn(positions[0], table())
    own = own_maps(SMALL)
    s = attn_out.shape(query, sources, TURNED, EPS, own, rows, programs)
    given = attn_out.operands(s, query, sources, sinks, turned, own)
    # NaNs where nothing is written.
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
    heads, _ = read(FixedPoint(*map(jnp.asarray, arrays), order=Order()))
    return heads.reshape(rows, SMALL.heads, SMALL.width), found["out"]


@pytest.mark.parametrize("window, used, programs", [(WINDOW, USED, 5), (96, 0, 20)])
def test_programs_attend_and_multiply(window, used, programs):
    value, out = run(window, used, ROWS, programs)
    query, sources, sinks, positions = drawn(window, used)
    ready = rotate(rms(query[None], EPS), positions[..., None], table())
    named = [Source(*jax.tree.map(lambda a: a[None], source)) for source in sources]
    expected = attend(ready, [source.seen() for source in named], sinks, "bfloat16")
    expected = rotate(expected, positions[..., None], table(), inverse=True)[0, :ROWS]
    # Weights are rounded to bfloat16 before and after they are scaled by the peak.
    np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-2)
    first, second, *_ = own_maps(SMALL)
    first, second = (np.asarray(dequantize(w), np.float64) for w in (first, second))
    grouped = value.reshape(ROWS, SMALL.groups, 1, -1)
    of_group = first.reshape(SMALL.groups, -1, first.shape[1]).swapaxes(1, 2)
    expected = (grouped @ of_group).reshape(ROWS, -1) @ second.T
    # What is between the maps is rounded to bfloat16.
    near = 2.0**-8 * np.abs(expected).max()
    np.testing.assert_allclose(out[:ROWS], expected, rtol=0, atol=near)
    same(out[ROWS:], np.repeat(out[ROWS - 1][None], WRITTEN - ROWS, 0))


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, whether a task is one block of heads or two."""
    whole, out = run(WINDOW, USED, ROWS, 5)
    for rows, programs in ((1, 12), (3, 31)):
        value, found = run(WINDOW, USED, rows, programs)
        both = min(rows, ROWS)
        same(value[:both], whole[:both])
        same(found[:both], out[:both])
        same(found[rows:], np.repeat(found[rows - 1][None], WRITTEN - rows, 0))


def flash(
    kind: str, dtype: str = "bfloat16", heads: int = FLASH.heads, k: int = FLASH.width
) -> tuple:
    """Return the shapes of queries, sources, and the output's maps."""
    shape = jax.ShapeDtypeStruct
    source = lambda held, size, chosen: (  # noqa: E731
        shape((held, k), jnp.float32),
        shape((8, size), jnp.bool),
        shape((8, size), jnp.int32) if chosen else None,
    )
    sources = {
        "dense": [],
        "CSA": [source(16512, 512, chosen=True)],
        "HCA": [source(516, 516, chosen=False)],
        "long": [source(4096, 4096, chosen=False)],
    }
    query = shape((8, heads, k), jnp.float32)
    first, second, *_ = jax.eval_shape(lambda: maps(FLASH, dtype)[:2])
    return query, [source(136, 136, chosen=False), *sources[kind]], first, second


def of_flash(find: Callable, *kind: Any) -> Any:
    """Return what `find` says of operands of such shapes."""
    found = []

    def call(query, sources, first, second):
        own = attn_out.Maps(first, second, FLASH.groups, ([*kind, "bfloat16"])[1])
        found.append(find(query, sources, own))

    jax.eval_shape(call, *flash(*kind))
    return found[0]


def made_for(rows: int, kind: str) -> Shape:
    return of_flash(
        lambda q, s, own: attn_out.shape(q, s, 64, EPS, own, rows, 132), kind
    )


@pytest.mark.parametrize("kind", ["dense", "CSA", "HCA"])
def test_a_ring_and_attention_have_the_room_there_is(kind):
    for rows in range(1, 9):
        s = made_for(rows, kind)
        assert s.attention
        assert s.shared <= ptx.SHARED < s.shared + SLOT + 16
        assert s.kept_rows == rows
        # Where a program would have a second task, tasks are larger.
        assert s.attention.tasks <= 132 or s.attention.each == 2


def test_a_task_is_one_block_of_heads_where_rows_are_few():
    one, two = (made_for(rows, "CSA").attention for rows in (1, 2))
    assert one
    assert two
    assert (one.each, two.each) == (1, 2)
    assert one.tasks == two.tasks == 84


@pytest.mark.parametrize(
    "expected, turned, kind",
    [
        (132, 64, ("dense", "bfloat16")),
        (132, 64, ("CSA", "bfloat16")),
        (132, 64, ("HCA", "bfloat16")),
        (0, 64, ("long", "bfloat16")),
        (0, 64, ("dense", "float32")),
        (0, 48, ("dense", "bfloat16")),
        (0, 160, ("dense", "bfloat16")),
        (0, 64, ("dense", "bfloat16", 512, 64)),
        (0, 64, ("dense", "bfloat16", 8, 4096)),
    ],
)
def test_what_it_serves(expected, turned, kind, monkeypatch):
    find = lambda query, sources, own: attn_out.programs(  # noqa: E731
        query, sources, turned, own
    )
    assert of_flash(find, *kind) == 0
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    assert of_flash(find, *kind) == expected


def test_it_is_for_a_gpu_and_not_for_a_cpu(monkeypatch):
    config, shape = ModelConfig.flash(experts=8, dtype="bfloat16"), jax.ShapeDtypeStruct
    query, sources, first, second = flash("CSA")
    own = {
        "attn_sinks.weight": shape((FLASH.heads,), jnp.float32),
        "attn_output_a.weight": first,
        "attn_output_b.weight": second,
    }

    def lowered() -> str:
        def attended(own, query, sources):
            one = jax.tree.map(lambda array: array[None], (query, sources))
            named = [Source(*source) for source in one[1]]
            every = collections.defaultdict(lambda: own["attn_output_a.weight"], own)
            with within(DecodePass(2, jnp.int32(2))):
                layer = Attention(config, 0, every)
                return layer._attend(one[0], named, jnp.arange(8)[None])

        return hopper.lowered(attended, own, query, sources)

    assert "attn_out" not in lowered()
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    assert "attn_out_2x8192x4096" in lowered()
