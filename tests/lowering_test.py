"""What the XLA implementation asks of a device: it lowers for CPU, CUDA and TPU alike.

No device is needed to lower.  TPUs and the plug-ins of Apple's GPUs do not have all
types, so neither float64, float8 nor 4-bit integers may occur in what is computed.
"""

import dataclasses
import functools

import hopper
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_matmul_test import EXPERTS, IN, TYPES, weight

from ds4jax import synthetic
from ds4jax.config import ModelConfig
from ds4jax.decode import carry as carries
from ds4jax.decode import cycles
from ds4jax.decode.modes import CONTINUOUS
from ds4jax.model import deepseek
from ds4jax.pallas.matmul import (
    every_expert_matmul,
    expert_matmul,
    grouped_matmul,
    quant_matmul,
)

PLATFORMS = ("cpu", "cuda", "tpu")
UNPORTABLE = ("float64", "complex128", "float8", "float4", "int4", "int2")


def dtypes(jaxpr) -> set[str]:
    """Return the types of all values of a jaxpr and of those inside it."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    found = set()
    values = [*inner.invars, *inner.constvars]
    for equation in inner.eqns:
        values += [*equation.invars, *equation.outvars]
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                found |= dtypes(parameter)
    return found | {str(v.aval.dtype) for v in values if hasattr(v.aval, "dtype")}


def unportable(function, *arguments) -> list[str]:
    """Return the types in `function` that some device lacks."""
    found = dtypes(jax.make_jaxpr(function)(*arguments))
    return [name for name in sorted(found) if any(t in name for t in UNPORTABLE)]


def lower(function, *arguments):
    """Lower for each platform."""
    leaves, tree = jax.tree.flatten(arguments)

    # Only leaves: jax puts what is no array into pytrees, which the tests' checks of
    # annotations refuse.
    def flat(*leaves):
        return jax.tree.leaves(function(*tree.unflatten(leaves)))

    for platform in PLATFORMS:
        assert hopper.lowered(flat, *leaves, platform=platform)


OPS = {
    "quant": (quant_matmul, (3, IN), (24,)),
    "grouped": (grouped_matmul, (3, 4, IN), (24,)),
    "expert": (
        lambda x, w, dtype: expert_matmul(x, w, jnp.zeros((3, 2), jnp.int32), dtype),
        (3, 2, IN),
        (EXPERTS, 24),
    ),
    "every": (every_expert_matmul, (3, IN), (EXPERTS, 24)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", TYPES)
def test_every_product_lowers_and_is_of_portable_types(name, op, dtype):
    product, rows, leading = OPS[op]
    arguments = jnp.ones(rows, dtype), weight(name, *leading)
    run = functools.partial(product, dtype=dtype)
    lower(run, *arguments)
    assert unportable(run, *arguments) == []


@pytest.mark.parametrize("rounding", ["none", "ds4"])
def test_the_decode_cycle_lowers_and_is_of_portable_types(rounding):
    """Seen red with FP8 rounded by a conversion to the type."""
    config = models.micro_config(head_dim=80, index_dim=32, kv_rounding=rounding)
    model = models.lively(config)
    carry = carries.create(model.config, 96, mtp=True)

    def cycle(model, carry):
        return cycles.cycle(model, carry, jnp.int32(-1), CONTINUOUS)

    assert {"float32", "int32", "bool"} <= dtypes(jax.make_jaxpr(cycle)(model, carry))
    assert unportable(cycle, model, carry) == []
    lower(cycle, model, carry)


@pytest.mark.parametrize("planted", ["float8_e4m3fn", "uint4", "int4", "float64"])
@pytest.mark.parametrize("place", ["outside", "scan", "cond", "jit"])
def test_a_planted_type_is_found_wherever_it_is(planted, place):
    def rounded(x):
        return x.astype(planted).astype(jnp.float32)

    function = {
        "outside": rounded,
        "scan": lambda x: jax.lax.scan(lambda c, _: (rounded(c), None), x, length=2)[0],
        "cond": lambda x: jax.lax.cond(x[0] > 0, rounded, lambda x: x, x),
        "jit": jax.jit(rounded),
    }[place]
    with jax.enable_x64():
        assert unportable(function, np.ones(3, np.float32)) == [planted]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_of_flash_lower_with_their_kernels(dtype):
    """What is only known once a kernel is compiled for a GPU: types, above all.

    Seen red with a word of weights of the wrong type in a kernel's annotation.
    """
    config = synthetic.shorten(ModelConfig.flash(), 4)
    config = dataclasses.replace(config, dtype=dtype)

    def run(tokens):
        model = deepseek.synthetic_model(config, "ds4-q2", mtp=True)
        carry = carries.create(config, 1024, mtp=True)
        modules = model.modules()
        out = modules.trunk(tokens, carry.cache)
        assert modules.mtp is not None
        drafted = modules.mtp(modules.trunk, tokens, out.streams, carry.mtp_cache)
        return out.logits, drafted.logits

    text = hopper.lowered(run, jnp.zeros((1, 2), jnp.int32))
    for name in ("q8_0_2x129280", "iq2_xxs_gated_12", "q2_k_12", "q4_k_gated_12"):
        assert name in text
