"""A mixture of experts in PTX, run by a machine of the tests' own.

What a GPU makes of the same text is tested in `gpu_test.py`.
"""

import functools
from typing import Any

import hc_ptx_test as hc
import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_machine import LANES, Machine

from ds4jax import schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm, scope
from ds4jax.model.moe import MoE
from ds4jax.pallas import moe_program, moe_ptx, ptx
from ds4jax.pallas.experts import Experts
from ds4jax.pallas.fixed_point import LIMBS
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.moe_shape import HIDDEN, THREADS
from ds4jax.pallas.passes import DecodePass, within
from ds4jax.pallas.router import Router
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

OUT, EXPERTS, ROWS = 96, 40, 4
ACTIVATION = Swiglu(0.5)
SCALE, SMALLEST = 1.5, 2.0**-14
TWINS, LARGE = (7, 33), 5
NEAR = {"bfloat16": 5e-4, "float32": 3e-6}
"""Of the largest: sums in another order, of hidden values that may round otherwise."""
same = np.testing.assert_array_equal


@functools.cache
def weights(width: int) -> tuple[Experts, Experts]:
    """Return the routed experts' and the shared one's."""
    blocks = lambda i, name, *shape: synthetic.blocks(  # noqa: E731
        jax.random.key(i), name, shape
    )
    gate, up = (blocks(i, "IQ2_XXS", EXPERTS, HIDDEN, width) for i in range(2))
    routed = Experts(gate, up, blocks(2, "Q2_K", EXPERTS, OUT, HIDDEN))
    gate, up = (blocks(i, "Q8_0", HIDDEN, width) for i in range(3, 5))
    return routed, Experts(gate, up, blocks(5, "Q8_0", OUT, HIDDEN))


def drawn(seed: int, *shape: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def reading(dtype: str, width: int) -> Reading:
    """Return what the rows are made of."""
    return hc.reading(dtype, 1, width=width, rows=ROWS)


def router(width: int, each: int, hashed: bool = False) -> Router:
    """Return one to which two experts are as good, and one of large logits."""
    first, second = TWINS
    weight = drawn(1, EXPERTS, width) / 32
    weight = weight.at[second].set(weight[first]).at[LARGE].multiply(40)
    bias = drawn(2, EXPERTS).at[jnp.asarray(TWINS)].set(20.0)
    bias = None if hashed else bias
    return Router(weight.astype(jnp.float16), bias, each, SCALE, SMALLEST)


def known(each: int) -> jax.Array:
    """Return what a table may choose."""
    ids = np.random.default_rng(3).permuted(
        np.tile(np.arange(EXPERTS), (ROWS, 1)), axis=1
    )
    return jnp.asarray(ids[:, :each], jnp.int32)


@functools.cache
def run(
    dtype: str,
    width: int,
    each: int,
    rows: int,
    programs: int,
    hashed: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return what programs write, and NaNs where they write nothing."""
    given = hc.first_rows(reading(dtype, width), rows)
    own = router(width, each, hashed)
    s = moe_ptx.shape(rows, given, own, OUT, ACTIVATION.limit, programs)
    assert s.shared <= ptx.SHARED
    ids = known(each) if hashed else None
    read = moe_ptx.operands(s, given, ids, own, *weights(width))
    written = [
        np.full(array.shape, -1, np.int32).view(array.dtype)
        for array in moe_ptx.written(s)
    ]
    operands = [*map(np.array, read), *written]
    text = moe_program.program(s)
    Machine(text, operands, s.shared, THREADS // LANES).run(programs, seed)
    found: dict[str, np.ndarray] = dict(zip(s.operands[:-1], operands, strict=True))
    same(found["counters"], 0)
    return found


def probabilities(x: np.ndarray) -> np.ndarray:
    """Return those of each row's experts."""
    weight = np.asarray(router(x.shape[1], 1).weight, np.float64)
    return np.sqrt(np.log1p(np.exp(np.float64(x) @ weight.T)))


def choice(x: np.ndarray, each: int, hashed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the experts of rows, of as good ones the first, and their shares."""
    own, probability = router(x.shape[1], each, hashed), probabilities(x)
    if own.bias is None:
        ids = np.asarray(known(each))[: len(x)]
    else:
        biased = probability + np.float64(own.bias)
        ids = np.argsort(-biased, axis=1, kind="stable")[:, :each]
    picked = np.take_along_axis(probability, ids, 1)
    return ids, picked / picked.sum(1, keepdims=True) * SCALE


def expected(x: np.ndarray, dtype: str, each: int, hashed: bool) -> list[np.ndarray]:
    """Return the shared expert's part and the others', hidden values rounded."""
    (routed, shared), (ids, share) = weights(x.shape[1]), choice(x, each, hashed)
    value = lambda w: np.asarray(dequantize(w), np.float64)  # noqa: E731
    chosen = lambda w, ids: value(jax.tree.map(lambda p: p[ids], w))  # noqa: E731
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)  # noqa: E731
    hidden = lambda *both: rounded(  # noqa: E731
        ACTIVATION(*(jnp.asarray(a, jnp.float32) for a in both))
    )
    x = rounded(x)
    gated = (np.einsum("ni,nuoi->nuo", x, chosen(w, ids)) for w in routed[:2])
    found = np.einsum("nuf,nuof->nuo", hidden(*gated), chosen(routed.down, ids))
    own = hidden(*(x @ value(w).T for w in shared[:2])) @ value(shared.down).T
    return [own, np.einsum("nu,nuo->no", share, found)]


@pytest.mark.parametrize(
    "dtype, width, each, rows, programs, hashed, seed",
    [
        ("bfloat16", 2048, 4, 1, 5, False, 0),
        ("float32", 2048, 2, 1, 2, True, 0),
        ("bfloat16", 4096, 1, 1, 3, False, 0),
        ("bfloat16", 2048, 1, 3, 5, False, 6),
        ("bfloat16", 2048, 1, 3, 5, False, 21),
    ],
)
def test_programs_compute_what_experts_give(
    dtype, width, each, rows, programs, hashed, seed
):
    """Seen red with the first row's activations for all, or another limb's.

    And with activations not cleared before either weight, without the wait for values
    to be read, and with sums of down put together without a wait.  It takes the turns
    of the last two cases for sums in one buffer, and for values of which only those of
    the task before the last have to be read.
    """
    found = run(dtype, width, each, rows, programs, hashed, seed)
    hc.assert_near(found, hc.expected(reading(dtype, width)), rows)
    x = found["x"][:rows]
    ids, _ = choice(x, each, hashed)
    same(found["ids"][:rows], ids)
    # A logit of 100, in float32, is off by 1e-5.
    probable = probabilities(x)
    np.testing.assert_allclose(found["probabilities"], probable, rtol=2e-5)
    wanted = expected(x, dtype, each, hashed)
    for name, exact in zip(("to_shexp", "to_routed"), wanted, strict=True):
        close = NEAR[dtype] * np.abs(exact).max()
        np.testing.assert_allclose(found[name][:rows], exact, rtol=0, atol=close)
    for name in ("ids", "to_shexp", "to_routed", *hc.NEAR):
        last = found[name][rows - 1]
        same(found[name][rows:], np.repeat(last[None], ROWS - rows, 0))


def test_whatever_the_number_of_rows_and_programs():
    """The same bits, by as many as a GPU has, and by two, of which one has two blocks.

    Of many, who waits for none of the others is early.  Seen red without the waits for
    sums of the streams, for the input, for logits, for all of them, for experts, for
    the shared expert's values, their group and all of them; with ties going to the last
    expert, no bias, up for gate, and a counter that wraps too late.
    """
    whole = run("bfloat16", 2048, 1, 2, 2)
    for name in ("ids", "to_shexp", "to_routed", *hc.NEAR):
        same(run("bfloat16", 2048, 1, 1, 140)[name][0], whole[name][0])


def test_memory_is_enough_for_all_rows():
    """Of a decode pass, at the shape of Flash."""
    own = router(4096, 6)
    for dtype in LIMBS:
        given = hc.reading(dtype, 1, width=4096, rows=8)
        for rows in range(1, 9):
            s = moe_ptx.shape(rows, given, own, 4096, ACTIVATION.limit, 132)
            assert s.shared <= ptx.SHARED


@pytest.mark.parametrize("hashed", [False, True])
def test_it_is_for_a_gpu_and_not_for_a_cpu(hashed, monkeypatch):
    width = 2048
    config = ModelConfig.flash(experts=EXPERTS, hidden=width)
    prefix = f"blk.{0 if hashed else config.hash_layers}."
    types = QuantPlan.named("ds4-q2").types

    def drawn():
        return {
            name.removeprefix(prefix): synthetic.tensor(config, name, s, types[s.group])
            for name, s in schema.trunk(config).items()
            if name.startswith(tuple(f"{prefix}{n}" for n in ("ffn", "exp", "hc_ffn")))
        }

    whole = hc.reading(config.dtype, 1, width=width, rows=ROWS)
    streams, update = jax.tree.map(lambda a: a[None], whole[:2])
    tokens = jax.ShapeDtypeStruct((1, ROWS), jnp.int32)

    def lowered() -> str:
        def run(streams, update, tokens, own):
            norm = RMSNorm(own["ffn_norm.weight"], config.rms_eps)
            connection = HyperConnection(config, scope(own, "hc_ffn_"))
            of_streams = MoE(config, hashed, own).of_streams
            with within(DecodePass(2, jnp.int32(2))):
                return of_streams(connection, norm, streams, Update(*update), tokens)

        return hopper.lowered(run, streams, update, tokens, jax.eval_shape(drawn))

    of_connection, of_all = "hc_mixed", "moe_2x6x2048x2048"
    text = lowered()
    assert of_connection in text and of_all not in text
    monkeypatch.setattr(ptx, "programs", lambda: 132)
    text = lowered()
    assert of_all in text and of_connection not in text


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"width": 4096}, True),
        ({"width": 1024}, False),
        ({"width": 6144}, False),
        ({"hidden": 1024}, False),
        ({"of_shared": 1024}, False),
        ({"out": 80}, False),
        ({"each": 6}, True),
        ({"activation": jnp.multiply}, False),
        ({"gate": "Q4_K"}, False),
        ({"down": "Q4_K"}, False),
        ({"shared": "F16"}, False),
        ({"router": "float32"}, False),
        ({"fn": "bfloat16"}, False),
        ({"rows": 9}, False),
    ],
)
def test_what_it_serves(changes, expected):
    given = dict(
        width=2048, hidden=2048, of_shared=2048, out=OUT, each=2, activation=ACTIVATION,
        gate="IQ2_XXS", down="Q2_K", shared="Q8_0", router="float16", fn="float16",
        rows=8,
    ) | changes  # fmt: skip
    weight = lambda name, *shape: jax.eval_shape(  # noqa: E731
        lambda: (
            jnp.zeros(shape, jnp.float16)
            if name == "F16"
            else synthetic.blocks(jax.random.key(0), name, shape)
        )
    )
    width, hidden, of_shared, out = (
        given[n] for n in ("width", "hidden", "of_shared", "out")
    )
    up = weight(given["gate"], EXPERTS, hidden, width)
    routed = Experts(up, up, weight(given["down"], EXPERTS, out, hidden))
    up = weight(given["shared"], of_shared, width)
    shared = Experts(up, up, weight(given["shared"], out, of_shared))
    own: Any = jax.ShapeDtypeStruct((EXPERTS, width), given["router"])
    router = Router(own, None, given["each"], SCALE, SMALLEST)
    of_rows = hc.reading("float32", 1, given["fn"], width, given["rows"])
    operands = of_rows, router, routed, shared, given["activation"]
    assert moe_ptx.serves(*operands, 132) == expected
