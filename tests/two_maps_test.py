"""Two products after each other in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import dataclasses
import functools
from typing import NamedTuple

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels_test import near, read
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.pallas import ptx, q8_0, two_maps, two_maps_program
from ds4jax.pallas.fixed_point import FixedPoint, Order, fix
from ds4jax.pallas.matmul import two_maps_kernel
from ds4jax.pallas.ptx import SHARED
from ds4jax.pallas.q8_arithmetic import SLOT, WARPS
from ds4jax.pallas.two_maps_shape import Shape
from ds4jax.quant import QuantTensor, dequantize

ROWS, WRITTEN = 2, 8
SCARCE = 100_000
"""Bytes with room for two tasks' weights, and one row's activations in bfloat16."""
same = np.testing.assert_array_equal


class Sizes(NamedTuple):
    columns: int
    groups: int
    middle: int
    out: int


FLASH = Sizes(4096, 8, 8192, 4096)
CASES = [
    ("bfloat16", Sizes(1024, 2, 1024, 96), SCARCE),
    ("float32", Sizes(2048, 4, 1024, 32), SHARED),
    ("bfloat16", Sizes(1024, 2, 2048, 48), SHARED),
]


def blocks(sizes: Sizes, first: str, second: str) -> tuple[QuantTensor, QuantTensor]:
    columns, _, middle, out = sizes
    return (
        synthetic.blocks(jax.random.key(0), first, (middle, columns)),
        synthetic.blocks(jax.random.key(1), second, (out, middle)),
    )


@functools.cache
def weights(sizes: Sizes) -> tuple[QuantTensor, QuantTensor]:
    return blocks(sizes, "Q8_0", "Q8_0")


def drawn(sizes: Sizes) -> jax.Array:
    shape = WRITTEN, sizes.groups, sizes.columns
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def run(
    dtype: str, sizes: Sizes, room: int, rows: int, programs: int
) -> tuple[FixedPoint, np.ndarray]:
    """Return the middle and the result; the rows not to be computed are NaNs."""
    columns, groups, middle, out = sizes
    x = drawn(sizes).at[rows:].set(jnp.nan).reshape(-1, columns)
    s = Shape(rows, WRITTEN, groups, columns, middle, out, dtype, programs, room=room)
    given = two_maps.operands(s, fix(x, dtype, interpret=True), *weights(sizes))
    # NaNs where nothing is written.
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in two_maps.written(s)
    ]
    text = two_maps_program.program(s)
    operands = [*map(np.array, given), *written]
    Machine(text, operands, s.shared, WARPS).run(programs, seed=rows)
    same(operands[s.operands.index("counters")], 0)
    words, scale, found = written
    arrays = words, scale, np.zeros((*scale.shape, 2), np.float32)
    return FixedPoint(*map(jnp.asarray, arrays), order=Order()), found


@pytest.mark.parametrize("dtype, sizes, room", CASES)
def test_a_program_computes_two_maps(dtype, sizes, room):
    """The middle is what Triton's kernel gives, but for the order of sums.

    Seen red without each of the waits, with a slot released before it is read, `d` of
    another row, activations of another group, and a copy that is not made.
    """
    found, out = run(dtype, sizes, room, ROWS, programs=5)
    first, second = weights(sizes)
    x = fix(drawn(sizes)[:ROWS].reshape(-1, sizes.columns), dtype, interpret=True)
    middle = q8_0.matvec_fixed(x, first, sizes.groups, dtype, interpret=True)
    same(found.scale, middle.scale)
    near(dataclasses.replace(found, sums=middle.sums), middle, dtype)
    value = read(found)[0].reshape(ROWS, -1)
    second = np.asarray(dequantize(second), np.float64)
    error = np.abs(out[:ROWS] - value @ second.T)
    # Of the magnitudes: what float32 sums of few parts may round away.
    assert np.all(error <= 2.0**-20 * (np.abs(value) @ np.abs(second).T))
    same(out[ROWS:], np.repeat(out[ROWS - 1][None], WRITTEN - ROWS, 0))


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, and whatever there is room for."""
    dtype, sizes, room = CASES[0]
    middle, whole = run(dtype, sizes, room, 4, programs=2)
    for rows, programs, other in ((1, 1, room), (2, 40, SHARED)):
        found, out = run(dtype, sizes, other, rows, programs)
        same(found.words, middle.words[:rows])
        same(found.scale, middle.scale[:rows])
        same(out[:rows], whole[:rows])
        same(out[rows:], np.repeat(whole[rows - 1][None], WRITTEN - rows, 0))


def test_a_ring_and_activations_have_the_room_there_is():
    for rows in range(1, 9):
        for dtype in ("float32", "bfloat16"):
            s = Shape(rows, 8, *FLASH, dtype, programs=132)
            assert s.shared <= SHARED < s.shared + SLOT + 16
            assert s.kept_rows == rows or s.slots == 2


def test_it_is_for_a_gpu_and_not_for_a_cpu(monkeypatch):
    sizes = CASES[0][1]
    first, second = weights(sizes)
    x = fix(drawn(sizes).reshape(-1, sizes.columns), "bfloat16", interpret=True)

    def lowered() -> str:
        def multiply(x, first, second):
            kernel = two_maps_kernel(first, second, sizes.groups, "bfloat16")
            assert kernel
            return kernel(2, x)

        return hopper.lowered(multiply, x, first, second)

    assert "two_maps" not in lowered()
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    assert "two_maps_2x1024x96" in lowered()


@pytest.mark.parametrize(
    "names, sizes, expected",
    [
        ("Q8_0 Q8_0", FLASH, True),
        ("Q8_0 Q8_0", Sizes(1024, 2, 1024, 96), True),
        ("Q8_0 Q8_0", Sizes(1024, 3, 1024, 96), False),
        ("Q8_0 Q8_0", Sizes(1024, 64, 1024, 96), False),
        ("Q8_0 Q8_0", Sizes(512, 2, 1024, 96), False),
        ("Q8_0 Q8_0", Sizes(3072, 2, 1024, 96), False),
        ("Q8_0 Q8_0", Sizes(1024, 2, 3072, 96), False),
        ("Q8_0 Q8_0", Sizes(1024, 2, 1024, 80), False),
        ("Q8_0 Q4_K", FLASH, False),
        ("Q4_K Q8_0", FLASH, False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_it_serves(names, sizes, expected, dtype):
    first, second = jax.eval_shape(lambda: blocks(sizes, *names.split()))
    assert two_maps.serves(first, second, sizes.groups, dtype, 132) == expected
