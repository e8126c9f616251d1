"""Gate and up of experts in IQ2_XXS, in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels_test import near
from ptx_machine import Machine

from ds4jax import synthetic
from ds4jax.pallas import experts, iq2_gated, iq2_program
from ds4jax.pallas.fixed_point import LIMBS, FixedPoint, Order, fix, shapes
from ds4jax.pallas.iq2_shape import WARPS, Shape
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

OUT, EXPERTS, ROWS = 64, 3, 3
IDS = np.array([[0, 2], [2, 1], [0, 1]], np.int32)
ACTIVATION = Swiglu(0.5)
ORDER = experts.FORMATS["IQ2_XXS"].order
CASES = [
    ("bfloat16", Order(levels=2), 2048),
    ("float32", Order(by_word=True), 2048),
    ("bfloat16", Order(), 4096),
]
same = np.testing.assert_array_equal


@functools.cache
def weights(width: int):
    blocks = lambda i: synthetic.blocks(  # noqa: E731
        jax.random.key(i), "IQ2_XXS", (EXPERTS, OUT, width)
    )
    return blocks(0), blocks(1)


def drawn(width: int) -> jax.Array:
    x = np.random.default_rng(0).normal(size=(ROWS, width))
    return jnp.asarray(x, jnp.float32)


def run(dtype: str, order: Order, width: int, rows: int, programs: int) -> FixedPoint:
    """Return what programs write for some rows, and NaNs for the others."""
    x = fix(drawn(width).at[rows:].set(jnp.nan), dtype, ORDER, interpret=True)
    s = Shape(
        rows * IDS.shape[1], IDS.shape[1], OUT, x.scale.shape[1], LIMBS[dtype], order,
        dtype, ACTIVATION.limit, programs,
    )  # fmt: skip
    given = [IDS.reshape(-1), *iq2_gated.operands(x, *weights(width))]
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in shapes(IDS.size, OUT, dtype, order)
    ]
    operands = [*map(np.array, given), *written]
    text = iq2_program.program(s)
    Machine(text, operands, s.shared, WARPS).run(programs, seed=rows)
    return FixedPoint(*map(jnp.asarray, written), order=order)


@pytest.mark.parametrize("dtype, order, width", CASES)
def test_a_program_computes_what_experts_give(dtype, order, width):
    """Seen red with signs of another row of the grid, and with up for gate."""
    found = run(dtype, order, width, ROWS, programs=5)
    rounded = np.asarray(drawn(width).astype(dtype), np.float64)
    products = (
        np.einsum("ni,nuoi->nuo", rounded, np.asarray(dequantize(w))[IDS])
        for w in weights(width)
    )
    exact = ACTIVATION(*(jnp.asarray(x, jnp.float32) for x in products))
    expected = fix(exact.reshape(IDS.size, OUT), dtype, order, interpret=True)
    same(found.scale, expected.scale)
    near(found, expected, dtype)


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, and nothing of what is not asked for."""
    case = CASES[0]
    whole = run(*case, ROWS, programs=2)
    for rows, programs in ((1, 1), (2, 3), (ROWS, 40)):
        found = run(*case, rows, programs)
        own = rows * IDS.shape[1]
        for part, expected in zip(
            jax.tree.leaves(found), jax.tree.leaves(whole), strict=True
        ):
            same(part[:own], expected[:own])
            assert np.all(np.asarray(part[own:]).view(np.int32) == -1)


def test_it_lowers_for_a_gpu_and_is_not_for_a_cpu():
    gate, up = weights(2048)
    x = fix(drawn(2048), "bfloat16", ORDER, interpret=True)

    def gated(x, gate, up):
        found = iq2_gated.gated(
            x, gate, up, jnp.asarray(IDS), ACTIVATION, "bfloat16", Order(), 2, 132
        )
        return jax.tree.leaves(found)

    assert "mosaic_gpu" in hopper.lowered(gated, x, gate, up)
    assert iq2_gated.programs(gate, ACTIVATION) == 0


@pytest.mark.parametrize(
    "name, out, width, activation, expected",
    [
        ("IQ2_XXS", 64, 2048, ACTIVATION, True),
        ("IQ2_XXS", 64, 4096, ACTIVATION, True),
        ("IQ2_XXS", 64, 1024, ACTIVATION, False),
        ("IQ2_XXS", 64, 6144, ACTIVATION, False),
        ("IQ2_XXS", 48, 2048, ACTIVATION, False),
        ("IQ2_XXS", 64, 2048, jnp.multiply, False),
        ("Q2_K", 64, 2048, ACTIVATION, False),
    ],
)
def test_what_it_serves(name, out, width, activation, expected):
    shape = functools.partial(synthetic.blocks, jax.random.key(0), name)
    gate = jax.eval_shape(lambda: shape((EXPERTS, out, width)))
    assert iq2_gated.serves(gate, activation) == expected
