"""The kernels of NVIDIA GPUs, interpreted, against what they stand for.

`gpu_test.py` has what only a GPU can show: the same on the device, and whole passes.
"""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_matmul_test import EXPERTS, IN, cast, rows, weight

from ds4jax import synthetic
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm
from ds4jax.pallas import experts, hyper_connection, router
from ds4jax.pallas.experts import Experts
from ds4jax.pallas.fixed_point import GROUP, LIMBS, FixedPoint, Order, fix
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.matmul import expert_matmul
from ds4jax.pallas.moe import has_kernels, moe_by_kernel, shared_by_kernel
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

ROWS = 8
WIDTHS = (1, 2, 3, 4, 7)
WIDE = (1, 2), (5,)
WORST = {"float32": 2.0**-19, "bfloat16": 2.0**-13}
"""Of the sum of magnitudes: twice what the last limb of `fix` may round away."""
UNSHARED = {"xla_backend_optimization_level": 0}
"""For the CPU to add each product in the same way, in programs of any width.

XLA has merged streams computed once for each use, and LLVM shares what products it can,
which depends on the other rows.  A shared one is rounded before it is added.
"""
swiglu = Swiglu(0.5)
ORDERS = Order(), Order(levels=2), Order(levels=4), Order(by_word=True)
PLAIN = {"F16": jnp.float16, "F32": jnp.float32}
DTYPES = pytest.mark.parametrize("dtype", LIMBS)
same = np.testing.assert_array_equal


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(found, spec: str, x, w, dtype: str, *factors):
    x = np.asarray(x.astype(dtype), np.float64)
    w = np.asarray(dequantize(w), np.float64)
    error = np.abs(found - np.einsum(spec, x, w, *factors))
    worst = np.einsum(spec, *map(np.abs, (x, w, *factors)))
    assert np.all(error <= WORST[dtype] * worst)


def assert_copies(found, expected, width: int):
    """The first rows have the bits of all rows' product, the others are copies."""
    same(found[:width], expected[:width])
    same(found[width:], np.repeat(expected[width - 1][None], ROWS - width, 0))


def read(x: FixedPoint) -> tuple[np.ndarray, np.ndarray]:
    """Return rows' values, float64 [R, G, GROUP], and the sums of their halves."""
    words = np.asarray(x.words)
    if x.order.by_word:
        words = words.swapaxes(-1, -2)
    limbs = np.ascontiguousarray(words).view(np.int8).astype(np.float64)
    place = 256.0 ** np.arange(limbs.shape[1])[::-1]
    value = np.einsum("l,rlgi->rgi", place, limbs)
    value *= np.asarray(x.scale, np.float64)[..., None]
    groups = x.order.place(np.arange(value.shape[1]), value.shape[1])
    return value[:, groups], np.asarray(x.sums)[:, groups]


def near(found: FixedPoint, expected: FixedPoint, dtype: str):
    """Compare what the same products, summed in different orders, are in fixed point.

    Rounding to the type is more than that, and the sums are of 16 values.
    """
    worst = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    (value, sums), (wanted, of_wanted) = read(found), read(expected)
    largest = abs(wanted).max(-1, keepdims=True)
    assert np.all(abs(value - wanted) <= worst * largest)
    assert np.all(abs(sums - of_wanted) <= 16 * worst * largest)


@DTYPES
@pytest.mark.parametrize("order", ORDERS)
def test_fixed_point_is_as_near_as_it_says(order, dtype):
    """Seen red with a unit twice as coarse."""
    x = rows(3) * jnp.exp(normal(0, 3, IN) * 4)
    x = x.at[0, :GROUP].set(0).at[1, GROUP].set(1e-38)
    value, sums = read(fix(x, dtype, order, interpret=True))
    exact = np.asarray(x.astype(dtype), np.float64).reshape(3, -1, GROUP)
    largest = abs(exact).max(-1, keepdims=True)
    assert np.all(abs(value - exact) <= 2.0 ** (2 - 8 * LIMBS[dtype]) * largest + 1e-34)
    same(sums[0, 0], 0)
    np.testing.assert_allclose(
        sums, exact.reshape(3, -1, 2, 16).sum(-1), rtol=1e-5, atol=1e-5
    )


@DTYPES
def test_fixed_point_of_normed_rows(dtype):
    x, norm = rows(3) * 5, RMSNorm(normal(0, IN), 0.01)
    found = fix(x, dtype, norm=(norm.weight.get_value(), norm.eps), interpret=True)
    value, sums = read(found)
    exact = np.asarray(norm(x), np.float64).reshape(value.shape)
    # A value just at the border of two bfloat16 may become either.
    worst = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    assert np.all(abs(value - exact) <= worst * abs(exact).max(-1, keepdims=True))
    np.testing.assert_allclose(
        sums, value.reshape(*sums.shape, 16).sum(-1), atol=16 * WORST[dtype] * 8
    )


@pytest.mark.parametrize(
    "name, used, dtype, width",
    [
        (name, used, [*LIMBS][(i + used) % 2], 1 + (i // 2 + used) % 2)
        for i, name in enumerate(experts.FORMATS)
        for used in (3, 4)
    ],
)
def test_experts_are_weighed_and_added(name, used, dtype, width):
    """One at a time, or two; every two of format, number, type and width meet.

    Seen red with the first one's share for all.
    """
    w, order = weight(name, EXPERTS, 24), experts.FORMATS[name].order
    x = rows(ROWS, used)
    ids = jnp.asarray(np.random.default_rng(0).integers(EXPERTS, size=(ROWS, used)))
    share = normal(2, ROWS, used)

    def run(x, share, width=None):
        fixed = fix(x.reshape(-1, IN), dtype, order, interpret=True)
        return experts.weighed(fixed, w, ids, share, width, interpret=True)

    whole = run(x, share)
    chosen = jax.tree.map(lambda plane: plane[ids], w)
    check(whole, "nui,nuoi,nu->no", x, chosen, dtype, share)
    spoilt = (a.at[width:].set(jnp.nan) for a in (x, share))
    assert_copies(run(*spoilt, width=width), whole, width)


@pytest.mark.parametrize("name", experts.FORMATS)
def test_experts_of_a_width_that_is_no_power_of_two(name):
    """Seen red when what is left after whole steps was dropped."""
    w = synthetic.blocks(jax.random.key(0), name, (2, 8, 3072))
    x, ids = normal(0, 2, 3072), jnp.asarray([[1, 0]])
    fixed = fix(x, "float32", experts.FORMATS[name].order, interpret=True)
    found = experts.weighed(fixed, w, ids, jnp.ones((1, 2)), interpret=True)
    chosen = jax.tree.map(lambda plane: plane[ids], w)
    check(found, "nui,nuoi->no", x[None], chosen, "float32")


@pytest.mark.parametrize(
    "name, order, dtype",
    list(zip(experts.FORMATS, ORDERS, [*LIMBS] * 2, strict=True)),
)
def test_gated_experts(name, order, dtype):
    """The fixed point of what the two products give; seen red with up for gate."""
    used, hidden = 2, 128
    gate, up = (
        synthetic.blocks(jax.random.key(i), name, (3, hidden, IN)) for i in range(2)
    )
    x, ids = (
        rows(ROWS),
        jnp.asarray(np.random.default_rng(0).integers(3, size=(ROWS, used))),
    )

    def run(x, width):
        fixed = fix(x, dtype, experts.FORMATS[name].order, interpret=True)
        return experts.gated(
            fixed, gate, up, ids, swiglu, dtype, order, width, interpret=True, warps=32
        )

    whole = run(x, None)
    value, sums = read(whole)
    products = [
        np.einsum("ni,nuoi->nuo", cast(x, dtype), np.asarray(dequantize(w))[ids])
        for w in (gate, up)
    ]
    exact = np.asarray(swiglu(*map(jnp.asarray, products))).reshape(value.shape)
    # Rounding to the type, next to which that of the products is small.
    worst = {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]
    largest = abs(exact).max(-1, keepdims=True)
    assert np.all(abs(value - exact) <= worst * largest)
    np.testing.assert_allclose(
        sums, value.reshape(*sums.shape, -1).sum(-1), rtol=1e-4, atol=1e-3
    )
    for width in (1, 3):
        found = run(x.at[width:].set(jnp.nan), width)
        first = lambda array: array[: width * used]  # noqa: B023, E731
        jax.tree.map(same, jax.tree.map(first, found), jax.tree.map(first, whole))


@pytest.mark.parametrize(
    "hidden, merges, dtype, widths",
    [
        (hidden, merges, [*LIMBS][(i + merges) % 2], WIDE[(i + merges // 2) % 2])
        for i, hidden in enumerate((128, 256))
        for merges in range(3)
    ],
)
def test_hyper_connection(hidden, merges, dtype, widths):
    """Every two of the four meet.  Seen red with fixed point before the norm."""
    config = models.micro_config(hc_eps=0.01, dtype=dtype)
    weights = {"fn": normal(1, 24, 4 * hidden) / 8, "base": normal(2, 24)}
    weights["scale"] = normal(3, 3)
    norm = RMSNorm(normal(4, hidden), config.rms_eps)
    streams = normal(5, ROWS, 4, hidden)
    assert hyper_connection.serves(streams)
    named = {f"{name}.weight": w for name, w in weights.items()}
    update = None
    if merges:
        sizes = [(hidden,)] * merges + [(4,), (4, 4)]
        *parts, post, mix = (normal(6 + i, ROWS, *s) for i, s in enumerate(sizes))
        update = Update(tuple(parts), post, mix)
    one, alone = jax.tree.map(lambda a: a[None], (streams, update))
    x, _, *others = HyperConnection(config, named)(one, alone, norm)
    expected = [x, *others]

    @functools.partial(jax.jit, static_argnums=1, compiler_options=UNSHARED)
    def read(rows, width):
        streams, update = rows
        of_norm = norm.weight.get_value()
        own = Reading(streams, update, **weights, norm=of_norm, config=config)
        return hyper_connection.read(own, ORDERS, width, interpret=True)

    x, fixed, *others = read((streams, update), None)
    for found, order in zip(fixed, ORDERS, strict=True):
        wanted = fix(x, dtype, order, interpret=True)
        same(found.words, wanted.words)
        same(found.scale, wanted.scale)
        np.testing.assert_allclose(found.sums, wanted.sums, rtol=1e-5, atol=1e-5)
    whole = [x, *others]
    for found, wanted in zip(whole, expected, strict=True):
        np.testing.assert_allclose(found, wanted[0], rtol=1e-5, atol=1e-5)
    for width in widths:
        blank = lambda a: a.at[width:].set(jnp.nan)  # noqa: B023, E731
        x, _, merged, *found = read(jax.tree.map(blank, (streams, update)), width)
        # Without an update the streams are what they were.
        found += [x, merged] if merges else [x]
        of_whole = [*others[1:], whole[0], others[0]]
        for of_some, of_all in zip(found, of_whole, strict=False):
            assert_copies(of_some, of_all, width)


def test_the_router():
    """Seen red with ties going to the highest index."""
    experts, used = 16, 6
    logits = jnp.round(normal(0, ROWS, experts))  # Ties among them.
    bias = jnp.round(normal(1, experts))

    def run(logits, width):
        sizes = used, 1.5, 2.0**-14
        return router.choose(logits, bias, *sizes, width, interpret=True)

    prob = jnp.sqrt(jax.nn.softplus(logits))
    _, chosen = jax.lax.top_k(prob + bias, used)
    picked = jnp.take_along_axis(prob, chosen, axis=-1)
    whole = run(logits, None)
    same(whole[0], chosen)
    expected = picked / picked.sum(-1, keepdims=True) * 1.5
    np.testing.assert_allclose(whole[1], expected, rtol=1e-6)
    for width in (1, 2, 5):
        found = run(logits.at[width:].set(jnp.nan), width)
        for of_some, of_all in zip(found, whole, strict=True):
            assert_copies(of_some, of_all, width)


@pytest.mark.parametrize(
    "gated, down", [("IQ2_XXS", "Q2_K"), ("Q4_K", "Q4_K"), ("Q8_0", "Q8_0")]
)
def test_moe_by_kernel(gated, down):
    """Each kernel gives the next what it reads, in its order."""
    gate, up, back = (
        synthetic.blocks(jax.random.key(i), name, (3, IN, IN))
        for i, name in enumerate((gated, gated, down))
    )
    x, ids = rows(2), jnp.asarray([[1, 0], [2, 1]])
    share = normal(2, 2, 2)
    own = (synthetic.blocks(jax.random.key(i), "Q8_0", (IN, IN)) for i in (3, 4, 5))
    shared, routed = Experts(*own), Experts(gate, up, back)
    found = moe_by_kernel(
        x[None], ids, share, routed, shared, lambda x: x, swiglu, "float32", 2,
        interpret=True,
    )  # fmt: skip
    product = lambda x, w: expert_matmul(x, w, ids)  # noqa: E731
    hidden = swiglu(product(x[:, None], gate), product(x[:, None], up))
    others = jnp.sum(share[..., None] * product(hidden, back), 1)
    alone = shared_by_kernel(x[None], shared, swiglu, "float32", 2, interpret=True)
    for part, expected in zip(found, (alone[0], others), strict=True):
        np.testing.assert_allclose(part[0], expected, rtol=1e-4, atol=1e-4)


def test_other_weights_have_no_kernels():
    q8_0, q6_k = (weight(name, EXPERTS, 24) for name in ("Q8_0", "Q6_K"))
    assert has_kernels(Experts(q8_0, q8_0, weight("Q2_K", EXPERTS, 24)))
    assert not has_kernels(Experts(q8_0, q8_0, q6_k))
    assert not has_kernels(Experts(q8_0, q8_0, weight("F16", EXPERTS, 24)))
    assert not has_kernels(Experts(q8_0, weight("Q2_K", EXPERTS, 24), q8_0))
