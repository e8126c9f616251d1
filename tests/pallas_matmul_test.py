"""The products of `pallas/matmul.py` against numpy, and the bits of their rows.

Numpy multiplies what `dequantize` gives, whose bits `quant_test.py` checks.
"""

import dataclasses
import functools
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ds4jax import quant
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.pallas.matmul import (
    einsum,
    every_expert_matmul,
    expert_matmul,
    experts_in_groups,
    grouped_matmul,
    quant_matmul,
    quant_matmuls,
)
from ds4jax.pallas.passes import watching
from ds4jax.quant import dequantize

WORST = 2.0**-20
"""Of the sum of the magnitudes.  Float32 sums of 256 terms are off by up to 2^-22; with
operands in bfloat16 that should be in float32 they would be by 2^-13 and more."""

IN, OUT, EXPERTS = 256, 24, 6
TYPES = (*quant.FORMATS, "F32", "F16")
EVERY_TYPE = pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in TYPES]
    + [(name, "bfloat16") for name in ("Q4_K", "F32", "F16")],
)
same = np.testing.assert_array_equal


@functools.cache
def weight(name: str, *leading: int) -> Any:
    """Return random weights `[*leading, IN]` of size 1 or so, of a ggml type."""
    rng = np.random.default_rng([TYPES.index(name), *leading])
    if name in ("F32", "F16"):
        values = rng.standard_normal((*leading, IN))
        return jnp.asarray(values, {"F32": "float32", "F16": "float16"}[name])
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    raw = rng.integers(0, 256, (*leading, IN // block * block_bytes), dtype=np.uint8)
    tensor = quant.pack(name, raw)
    planes = dict(tensor.planes)
    for plane, values in planes.items():
        if values.dtype == np.float16:  # random bits have infinities
            planes[plane] = rng.uniform(0.01, 0.02, values.shape).astype(np.float16)
        if plane == "exponents":
            planes[plane] = rng.integers(120, 128, values.shape, dtype=np.uint8)
    return jax.tree.map(jnp.asarray, dataclasses.replace(tensor, planes=planes))


def rows(*leading: int) -> jax.Array:
    rng = np.random.default_rng(leading)
    return jnp.asarray(rng.standard_normal((*leading, IN), np.float32))


def cast(x, dtype: str) -> np.ndarray:
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    return np.asarray(x, np.float32).astype(types[dtype]).astype(np.float64)


def check(found, spec: str, x, w, dtype: str = "float32", worst: float = WORST):
    """Compare with numpy's product in float64 of the operands in `dtype`."""
    x, w = cast(x, dtype), cast(dequantize(w), dtype)
    expected, size = np.einsum(spec, x, w), np.einsum(spec, abs(x), abs(w))
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    assert np.max(np.abs(found - expected) / size) < worst


@EVERY_TYPE
def test_quant_matmul(name, dtype):
    w = weight(name, OUT)
    for shape in ((), (1,), (2, 5)):
        x = rows(*shape)
        check(quant_matmul(x, w, dtype), "...i,oi->...o", x, w, dtype)


@pytest.mark.parametrize("names", [("Q8_0", "Q8_0"), ("Q8_0", "F16")])
def test_several_weights_of_the_same_rows(names):
    """As one by one, and reported one by one."""
    x, told = rows(2, 5), []
    weights = [weight(name, out) for name, out in zip(names, (24, 8), strict=True)]
    with watching(lambda x, w, ids: told.append(w)):
        found = quant_matmuls(x, weights, "bfloat16")
    assert [id(w) for w in told] == [id(w) for w in weights]
    for out, w in zip(found, weights, strict=True):
        same(out, quant_matmul(x, w, "bfloat16"))


@EVERY_TYPE
def test_grouped_matmul(name, dtype):
    """Group g owns the g-th run of rows of the stored matrix."""
    x, w = rows(3, 4), weight(name, OUT)
    found = grouped_matmul(x, w, dtype)
    for g in range(4):
        own = np.asarray(dequantize(w))[6 * g : 6 * (g + 1)]
        check(found[:, g], "ni,oi->no", x[:, g], own, dtype)


IDS = jnp.array([[5, 0], [0, 5], [3, 3], [1, 4]])


@EVERY_TYPE
def test_expert_matmul_takes_the_experts_it_is_told(name, dtype):
    x, w = rows(4, 2), weight(name, EXPERTS, OUT)
    found = expert_matmul(x, w, IDS, dtype)
    chosen = np.asarray(dequantize(w))[np.asarray(IDS)]
    check(found, "nui,nuoi->nuo", x, chosen, dtype)


@EVERY_TYPE
def test_every_expert_matmul(name, dtype):
    """The experts share their rows, or have their own."""
    w = weight(name, EXPERTS, OUT)
    for x, spec in ((rows(5), "ni,eoi->eno"), (rows(EXPERTS, 5), "eni,eoi->eno")):
        check(every_expert_matmul(x, w, dtype), spec, x, w, dtype)


@pytest.mark.parametrize("dtype, worst", [("float32", WORST), ("bfloat16", 2.0**-8)])
def test_gradients_are_products_of_operands_in_dtype(dtype, worst):
    """A gradient itself is in float32; in between it may be a bfloat16."""
    x, w = rows(5), weight("F32", OUT)
    given = jnp.asarray(np.random.default_rng(0).standard_normal((5, OUT), "f4"))
    product = lambda x, w: einsum("ni,oi->no", x, w, dtype)  # noqa: E731
    dx, dw = jax.vjp(product, x, w)[1](given)
    check(dx, "no,oi->ni", given, w, dtype, worst)
    check(dw, "no,ni->oi", given, x, dtype, worst)


@pytest.mark.parametrize(
    "experts, groups",
    [(1, 1), (6, 1), (16, 1), (17, 17), (18, 2), (24, 2), (30, 2), (32, 2), (34, 17),
     (48, 3), (96, 6), (100, 10), (255, 17), (256, 16), (384, 24)],
)  # fmt: skip
def test_experts_in_groups_are_at_most_16_and_in_order(experts, groups):
    fewest = min(g for g in range(1, experts + 1) if experts / g in range(1, 17))
    array = jnp.arange(experts * 3.0).reshape(experts, 3)
    found, number = experts_in_groups(array, experts)
    assert isinstance(found, jax.Array)
    assert number == groups == fewest
    assert found.shape == (groups, experts // groups, 3)
    same(found.reshape(experts, 3), array)


def test_experts_in_groups_splits_every_plane():
    w = weight("Q2_K", 32, 2)
    found, groups = experts_in_groups(w, 32)
    assert groups == 2 and found.shape == (2, 16, 2, IN)
    same(dequantize(found).reshape(32, 2, IN), dequantize(w))


# XLA picks a kernel by the shapes, so these are of the shapes of the model that ships
# and of some that fit no vector.
SHAPES = pytest.mark.parametrize("size, out", [(IN, 24), (IN, 512), (72, 37)])


def products(size: int, out: int):
    """Return each product as a function of N rows `[N, 2, size]`, rows leading."""
    rng = np.random.default_rng([size, out])
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    matrix, experts = draw(2 * out, size), draw(EXPERTS, out, size)

    def chosen(x):
        # Each row brings its experts with it, by the sign of its first channel.
        ids = jnp.where(x[..., 0] > 0, 1, 4)
        return expert_matmul(x, experts, ids)

    return {
        "quant": lambda x: quant_matmul(x, matrix),
        "grouped": lambda x: grouped_matmul(x, matrix),
        "expert": chosen,
        "every": lambda x: every_expert_matmul(x[:, 0], experts).transpose(1, 0, 2),
        "own": lambda x: every_expert_matmul(
            jnp.broadcast_to(x[:, 0], (EXPERTS, len(x), size)), experts
        ).transpose(1, 0, 2),
    }


@SHAPES
@pytest.mark.parametrize("name", ["quant", "grouped", "expert", "every", "own"])
def test_a_rows_bits_do_not_depend_on_the_others(name, size, out):
    """Nor on its place.

    How many there are may matter, and does from XLA of jax 0.12 on: that is why every
    decode pass is of as many.
    """
    product = jax.jit(products(size, out)[name])
    n = DECODE_ROWS
    x = np.random.default_rng(1).standard_normal((n, 2, size), np.float32)
    expected = np.asarray(product(x))
    for shift in range(1, n):
        found = product(np.roll(x, shift, axis=0))
        same(found, np.roll(expected, shift, axis=0), err_msg=f"moved by {shift}")
        alone = np.where(np.arange(n)[:, None, None] == shift, x, -100 * x)
        same(product(alone)[shift], expected[shift], err_msg=f"row {shift}")
