"""The kernels of dense products on NVIDIA GPUs, interpreted, and chains of them."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels_test import (
    DTYPES,
    PLAIN,
    ROWS,
    WIDTHS,
    assert_copies,
    check,
    read,
    same,
    swiglu,
)
from pallas_matmul_test import IN, cast, rows, weight

from ds4jax import synthetic
from ds4jax.pallas import plain, q8_0
from ds4jax.pallas.experts import Experts
from ds4jax.pallas.fixed_point import GROUP, fix, fix_gated
from ds4jax.pallas.matmul import (
    quant_matmul,
    two_maps_kernel,
)
from ds4jax.pallas.moe import has_shared_kernel, shared_by_kernel
from ds4jax.quant import QuantTensor, dequantize


@DTYPES
@pytest.mark.parametrize("out", [24, 7])
def test_q8_0(out, dtype):
    x, w = rows(ROWS), weight("Q8_0", out)
    expected = q8_0.matvec(fix(x, dtype, interpret=True), w, interpret=True)[:, 0]
    check(expected, "ri,oi->ro", x, w, dtype)
    for width in WIDTHS if out == 24 else ():
        spoilt = fix(x.at[width:].set(jnp.nan), dtype, interpret=True)
        found = q8_0.matvec(spoilt, w, width=width, interpret=True)[:, 0]
        assert_copies(found, expected, width)


@DTYPES
@pytest.mark.parametrize("groups, out", [(3, 8), (6, 2)])
def test_q8_0_by_groups(groups, out, dtype):
    """Seen red with programs of four rows where a group has two."""
    x, w = rows(ROWS, groups), weight("Q8_0", groups * out)
    fixed = fix(x.reshape(-1, IN), dtype, interpret=True)
    expected = q8_0.matvec(fixed, w, groups, interpret=True)
    parts = jax.tree.map(lambda plane: plane.reshape(groups, out, -1), w)
    check(expected, "rgi,goi->rgo", x, parts, dtype)
    found = q8_0.matvec(fixed, w, groups, 2, interpret=True)
    assert_copies(found, expected, 2)


@pytest.mark.parametrize("name", ["F16", "F32"])
@pytest.mark.parametrize("out", [24, 7])
def test_plain(out, name):
    x, w = rows(ROWS), weight(name, out)
    expected = plain.matvec(x, w, interpret=True)
    check(expected, "ri,oi->ro", x, w, "float32")
    for width in WIDTHS if out == 24 else ():
        found = plain.matvec(x.at[width:].set(jnp.nan), w, width, interpret=True)
        assert_copies(found, expected, width)


@pytest.mark.parametrize("name", ["Q8_0", "F16"])
def test_weights_in_one_launch(name):
    """Each product has the bits that it has by itself.

    Seen red with the last rows of each left out.
    """
    weights = [weight(name, out) for out in (24, 8, 16)]
    x, kernel = rows(ROWS), plain
    if name == "Q8_0":
        x, kernel = fix(x, "bfloat16", interpret=True), q8_0
    tile = (2, 8 if name == "Q8_0" else IN, 2)
    found = kernel.matvecs(x, weights, 3, interpret=True, tile=tile)
    for out, w in zip(found, weights, strict=True):
        alone = kernel.matvec(x, w, width=3, interpret=True, tile=tile)
        same(out, alone.reshape(out.shape))


@pytest.mark.parametrize(
    "name, outs, size, groups",
    [
        ("Q8_0", [129280], 4096, 1),
        ("Q8_0", [32768], 1024, 1),
        ("Q8_0", [8192], 4096, 8),
        ("Q8_0", [4096], 8192, 1),
        ("Q8_0", [4096], 2048, 1),
        ("Q8_0", [1024, 512], 4096, 1),
        ("F16", [8192], 1024, 1),
        ("F16", [1024, 1024], 4096, 1),
        ("F16", [64], 4096, 1),
        ("F32", [256], 4096, 1),
        ("F32", [4], 16384, 1),
    ],
)
def test_dense_kernels_lower_at_the_shapes_of_flash(name, outs, size, groups):
    """Triton takes powers of two only, and not all operations."""
    shape = jax.ShapeDtypeStruct

    def packed(n):
        planes = {"quants": shape((n, size // 4), jnp.uint32)}
        return QuantTensor(name, planes | {"d": shape((n, size // 32), jnp.float16)})

    def product(x, weights):
        if name in PLAIN:
            return plain.matvecs(x, weights, 2)
        if groups > 1:
            return q8_0.matvec(fix(x, "bfloat16"), weights[0], groups, 2)
        return q8_0.matvecs(fix(x, "float32"), weights, 2)

    weights = [
        shape((n, size), PLAIN[name]) if name in PLAIN else packed(n) for n in outs
    ]
    x = shape((8 * groups, size), jnp.float32)
    kernel = "plain" if name in PLAIN else "q8_0"
    assert f"{kernel}_2x{outs[0]}" in hopper.lowered(product, x, weights)


@DTYPES
def test_a_shared_expert(dtype):
    """Gate and up give down what it reads, in its order; the other rows are copies."""
    gate, up, down = (
        synthetic.blocks(jax.random.key(i), "Q8_0", (IN, IN)) for i in range(3)
    )
    x = rows(ROWS)
    expert = Experts(gate, up, down)
    assert has_shared_kernel(expert)

    def kernel(width, x):
        return shared_by_kernel(x, expert, swiglu, dtype, width, interpret=True)

    product = functools.partial(quant_matmul, dtype=dtype)
    expected = product(swiglu(product(x, gate), product(x, up)), down)
    whole = kernel(ROWS, x[None])[0]
    # The reference rounds what SwiGLU gives to bfloat16, as the kernel does.
    worst = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(whole, expected, rtol=worst, atol=worst)
    assert_copies(kernel(2, x.at[2:].set(jnp.nan)[None])[0], whole, 2)


def test_a_shared_expert_of_other_weights_has_no_kernel():
    own = [weight(name, 24) for name in ("Q8_0", "Q4_K")]
    found = [(own[i == 0], own[i == 1], own[i == 2]) for i in range(3)]
    assert not any(has_shared_kernel(Experts(*w)) for w in found)


@DTYPES
def test_fixed_point_of_gated_rows(dtype):
    """Seen red with gate and up the other way round."""
    gate, up = rows(3), rows(4)[1:]
    value, sums = read(fix_gated(gate, up, swiglu, dtype, interpret=True))
    expected = read(fix(swiglu(gate, up), dtype, interpret=True))
    worst = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(value, expected[0], rtol=worst, atol=worst)
    np.testing.assert_allclose(sums, expected[1], rtol=worst, atol=16 * worst)


@DTYPES
@pytest.mark.parametrize("groups", [1, 3])
def test_a_product_in_fixed_point(groups, dtype):
    """As near as the next product's operands can be, and each row's bits its own.

    Seen red with groups of the result in reverse, and with all rows of the first.
    """
    x, w = rows(ROWS, groups), weight("Q8_0", groups * 2 * GROUP)
    assert q8_0.serves_fixed(w, groups)
    fixed = fix(x.reshape(-1, IN), dtype, interpret=True)
    run = functools.partial(q8_0.matvec_fixed, fixed, w, groups, dtype, interpret=True)
    expected = run()
    value, _ = read(expected)
    exact = q8_0.matvec(fixed, w, groups, interpret=True).reshape(ROWS, -1, GROUP)
    largest = np.abs(exact).max(-1, keepdims=True)
    # A value just at the border of two bfloat16 may become either.
    worst = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    assert np.all(abs(value - exact) <= worst * largest)
    for width in (1, 2):
        jax.tree.map(
            lambda some, all, n=width: same(some[:n], all[:n]), run(width), expected
        )


@DTYPES
def test_two_maps(dtype):
    """The first gives the second what it reads; the other rows are copies."""
    first, second = weight("Q8_0", 3 * GROUP), weight("Q8_0", 24)
    second = jax.tree.map(lambda plane: plane[:, : plane.shape[1] // 8 * 3], second)
    kernel = two_maps_kernel(first, second, 3, dtype, interpret=True)
    assert kernel
    x = rows(ROWS, 3)
    run = lambda width, x: kernel(  # noqa: E731
        width, fix(x.reshape(-1, IN), dtype, interpret=True)
    )[0]
    whole = run(ROWS, x)
    parts = cast(dequantize(first), "float32").reshape(3, GROUP, IN)
    middle = np.einsum("rgi,goi->rgo", cast(x, dtype), parts).reshape(ROWS, -1)
    expected = middle @ cast(dequantize(second), "float32").T
    worst = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(whole, expected, rtol=worst, atol=worst * 100)
    assert_copies(run(2, x.at[2:].set(jnp.nan)), whole, 2)


def test_two_maps_of_other_weights_have_no_kernel():
    """Of another format, or of groups whose results share no scale."""
    q8_0, q4_k = (weight(name, 3 * GROUP) for name in ("Q8_0", "Q4_K"))
    for first, second, groups in ((q8_0, q4_k, 3), (q4_k, q8_0, 3), (q8_0, q8_0, 2)):
        assert not two_maps_kernel(first, second, groups, "float32")
