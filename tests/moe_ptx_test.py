"""A mixture of experts in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import LANES, Machine

from ds4jax import synthetic
from ds4jax.pallas import moe_program, moe_ptx, ptx
from ds4jax.pallas.experts import Experts
from ds4jax.pallas.fixed_point import GROUP, Order, fix, shapes
from ds4jax.pallas.moe import moe_by_kernel
from ds4jax.pallas.moe_shape import HIDDEN, OPERANDS, ORDER, THREADS, Shape
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

OUT, EXPERTS, ROWS = 96, 5, 4
IDS = np.array([[0, 3, 1, 4], [2, 1, 0, 3], *2 * [[4] * 4]], np.int32)
SHARE = np.array([[0.5, 0.25, -1.0, 0.75], [0.1, 2.0, 0.3, -0.7], *2 * [[1.0] * 4]])
ACTIVATION = Swiglu(0.5)
NEAR = {"bfloat16": 2e-4, "float32": 3e-6}
"""Of the largest: sums in another order, of hidden values that may round otherwise."""
same = np.testing.assert_array_equal


@functools.cache
def weights(width: int):
    blocks = lambda i, name, *shape: synthetic.blocks(  # noqa: E731
        jax.random.key(i), name, shape
    )
    gate, up = (blocks(i, "IQ2_XXS", EXPERTS, HIDDEN, width) for i in range(2))
    routed = Experts(gate, up, blocks(2, "Q2_K", EXPERTS, OUT, HIDDEN))
    return routed, blocks(3, "Q8_0", OUT, HIDDEN)


def drawn(seed: int, width: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(ROWS, width))
    return jnp.asarray(x, jnp.float32)


@functools.cache
def run(dtype: str, width: int, each: int, rows: int, programs: int):
    """Return what programs write, and NaNs where they write nothing."""
    x, hidden = (
        fix(drawn(i, k).at[rows:].set(jnp.nan), dtype, order, interpret=True)
        for i, (k, order) in enumerate(
            [(width, Order(by_word=True)), (HIDDEN, Order())]
        )
    )
    s = Shape(
        rows, ROWS - rows, each, width // GROUP, OUT, dtype, ACTIVATION.limit, programs
    )
    read = moe_ptx.operands(
        s,
        x,
        hidden,
        *weights(width),
        jnp.asarray(IDS[:, :each]),
        jnp.float32(SHARE[:, :each]),
    )
    own = jax.ShapeDtypeStruct((ROWS, OUT), jnp.float32)
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in (*shapes(ROWS * each, HIDDEN, dtype, ORDER), own, own)
    ]
    operands = [*map(np.array, read), *written]
    text = moe_program.program(s)
    Machine(text, operands, s.shared, THREADS // LANES).run(programs, rows)
    same(operands[OPERANDS.index("finished")], 0)
    return written


def expected(dtype: str, width: int, each: int) -> list[np.ndarray]:
    """Return the shared expert's part and the others', hidden values rounded."""
    routed, down = weights(width)
    value = lambda w: np.asarray(dequantize(w), np.float64)  # noqa: E731
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)  # noqa: E731
    x, ids = rounded(drawn(0, width)), IDS[:, :each]
    gate, up = (np.einsum("ni,nuoi->nuo", x, value(w)[ids]) for w in routed[:2])
    hidden = ACTIVATION(*(jnp.asarray(a, jnp.float32) for a in (gate, up)))
    found = np.einsum("nuf,nuof->nuo", rounded(hidden), value(routed.down)[ids])
    own = rounded(drawn(1, HIDDEN)) @ value(down).T
    return [own, np.einsum("nu,nuo->no", SHARE[:, :each], found)]


@pytest.mark.parametrize(
    "dtype, width, each, rows, programs",
    [
        ("bfloat16", 2048, 4, 1, 5),
        ("float32", 2048, 2, 1, 2),
        ("bfloat16", 4096, 1, 1, 3),
    ],
)
def test_programs_compute_what_experts_give(dtype, width, each, rows, programs):
    *hidden, own, routed = run(dtype, width, each, rows, programs)
    for found, exact in zip((own, routed), expected(dtype, width, each), strict=True):
        close = NEAR[dtype] * np.abs(exact).max()
        np.testing.assert_allclose(found[:rows], exact[:rows], rtol=0, atol=close)
        same(found[rows:], np.repeat(found[rows - 1 : rows], ROWS - rows, 0))
    for part in hidden:
        assert np.all(part[rows * each :].view(np.int32) == -1)


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, by programs of which one has two blocks of rows too."""
    *_, own, routed = run("bfloat16", 2048, 1, 2, 2)
    *_, same_own, same_routed = run("bfloat16", 2048, 1, 1, 5)
    same(same_own[0], own[0])
    same(same_routed[0], routed[0])


def test_it_lowers_for_a_gpu_and_is_not_for_a_cpu(monkeypatch):
    routed, down = weights(2048)
    up = jax.eval_shape(
        lambda: synthetic.blocks(jax.random.key(0), "Q8_0", (HIDDEN, 2048))
    )
    shared, ids = Experts(up, up, down), jnp.asarray(IDS)

    def moe(x, share, routed, shared):
        return moe_by_kernel(
            x, ids, share, routed, shared, lambda x: x, ACTIVATION, "bfloat16", 2
        )

    operands = drawn(0, 2048)[None], jnp.float32(SHARE), routed, shared
    assert moe_ptx.programs(routed, down, ACTIVATION, 4) == 0
    assert "mosaic_gpu" not in hopper.lowered(moe, *operands)
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    jax.clear_caches()
    assert "mosaic_gpu" in hopper.lowered(lambda *a: moe(*a), *operands)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"width": 4096}, True),
        ({"width": 1024}, False),
        ({"width": 6144}, False),
        ({"hidden": 1024}, False),
        ({"out": 80}, False),
        ({"each": 6}, True),
        ({"activation": jnp.multiply}, False),
        ({"gate": "Q4_K"}, False),
        ({"down": "Q4_K"}, False),
        ({"shared": "F16"}, False),
    ],
)
def test_what_it_serves(changes, expected):
    given = dict(
        width=2048, hidden=2048, out=OUT, each=2, activation=ACTIVATION,
        gate="IQ2_XXS", down="Q2_K", shared="Q8_0",
    ) | changes  # fmt: skip
    weight = lambda name, *shape: jax.eval_shape(  # noqa: E731
        lambda: (
            jnp.zeros(shape, jnp.float16)
            if name == "F16"
            else synthetic.blocks(jax.random.key(0), name, shape)
        )
    )
    up = weight(given["gate"], EXPERTS, given["hidden"], given["width"])
    down = weight(given["down"], EXPERTS, given["out"], given["hidden"])
    shared = weight(given["shared"], given["out"], given["hidden"])
    routed, activation = Experts(up, up, down), given["activation"]
    assert moe_ptx.serves(routed, shared, activation, given["each"]) == expected
