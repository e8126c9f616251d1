"""The products of decode passes of DeepSeek-V4-Flash, as cases of `kernel_times.py`.

A case is what one launch multiplies, a weight or several of the same input: dense ones,
and those of experts, six for each row and all different.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_case import DTYPE, Case, normal

from ds4jax import synthetic
from ds4jax.config import ModelConfig
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm
from ds4jax.pallas import experts, moe_ptx, q8_0
from ds4jax.pallas.fixed_point import fix
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.matmul import (
    expert_matmul,
    grouped_matmul,
    quant_matmul,
    quant_matmuls,
    two_maps_kernel,
)
from ds4jax.pallas.passes import DecodePass, within
from ds4jax.pallas.router import Router
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

WIDTHS = (1, 2, 4)
HIDDEN, FFN, EXPERTS, USED = 4096, 2048, 64, 6
COMPARED = 1024
"""Rows of a weight, of whose products the error is computed."""

ACTIVATION = Swiglu(10.0)

ONCE = "loop_broadcast", "wrapped_broadcast"
"""How XLA's names begin of what makes zeros, for counters: a pass does so once."""


def random_weight(seed: int, format: str, shape: tuple[int, ...]) -> Any:
    """Return a weight of a format, values of size 1 / sqrt(in) or so."""
    if format == "F16":
        return (normal(seed, *shape) / 64).astype(jnp.float16)
    return synthetic.blocks(jax.random.key(seed), format, shape)


def dense(format: str, what: str, outs: list[int], k: int) -> Case:
    """Return the case of weights of so many rows each and k columns."""

    def draw():
        x = normal(0, 1, DECODE_ROWS, k, dtype=DTYPE)
        return x, [random_weight(i, format, (n, k)) for i, n in enumerate(outs, 1)]

    def product(x, weights):
        return quant_matmuls(x, weights, DTYPE)

    def run(width, x, weights):
        with within(DecodePass(width, jnp.int32(width))):
            return product(x, weights)

    def nbytes(width, x, weights):
        return x.nbytes // DECODE_ROWS * width + sum(w.nbytes for w in weights)

    def exact(x, weights):
        most = min(outs[0], COMPARED)
        part = jax.tree.map(lambda plane: plane[:most], weights[0])
        return np.asarray(x[0], np.float64) @ np.asarray(dequantize(part)).T

    return Case(
        "plain" if format == "F16" else "q8_0", what, draw, run, product, nbytes,
        WIDTHS, ("fix",), exact=exact,
        shape=_shape(format, "+".join(map(str, outs)), k, 1),
    )  # fmt: skip


def into_fixed_point(what: str, n: int, k: int, groups: int) -> Case:
    """Return the case of a weight by groups, its results put into fixed point."""

    def draw():
        x = normal(0, DECODE_ROWS * groups, k, dtype=DTYPE)
        return x, random_weight(1, "Q8_0", (n, k))

    def run(width, x, w):
        return q8_0.matvec_fixed(fix(x, DTYPE), w, groups, DTYPE, width)

    def xla(x, w):
        return grouped_matmul(x.reshape(DECODE_ROWS, groups, k), w, DTYPE)

    def nbytes(width, x, w):
        return x.nbytes // DECODE_ROWS * width + w.nbytes

    return Case(
        "q8_0", what, draw, run, xla, nbytes, WIDTHS, ("fix",),
        shape=_shape("Q8_0", str(n), k, groups),
    )  # fmt: skip


def two_maps(what: str, middle: int, n: int, k: int, groups: int) -> Case:
    """Return the case of two weights after each other, the first by groups."""

    def draw():
        x = normal(0, DECODE_ROWS * groups, k, dtype=DTYPE)
        first, second = (
            random_weight(i, "Q8_0", shape)
            for i, shape in enumerate([(middle, k), (n, middle)], 1)
        )
        return x, first, second

    def run(width, x, first, second):
        kernel = two_maps_kernel(first, second, groups, DTYPE)
        assert kernel
        return kernel(width, fix(x, DTYPE))

    def xla(x, first, second):
        x = grouped_matmul(x.reshape(DECODE_ROWS, groups, k), first, DTYPE)
        return quant_matmul(x.reshape(DECODE_ROWS, middle), second, DTYPE)

    def nbytes(width, x, first, second):
        return x.nbytes // DECODE_ROWS * width + first.nbytes + second.nbytes

    return Case(
        "two_maps", what, draw, run, xla, nbytes, WIDTHS, ("fix", *ONCE),
        shape=_shape("Q8_0", f"{middle}, {n}", k, groups),
    )  # fmt: skip


def gated(format: str, what: str, of_down: str) -> Case:
    """Return the case of `experts.gated`.

    Args:
      format: of gate and up.
      what: they are.
      of_down: format of the weight that the result is multiplied by.
    """

    def draw():
        x = normal(0, DECODE_ROWS, HIDDEN, dtype=DTYPE)
        weights = (random_weight(i, format, (EXPERTS, FFN, HIDDEN)) for i in (1, 2))
        return x, *weights, chosen()

    def run(width, x, gate, up, ids):
        order, of_hidden = (experts.FORMATS[f].order for f in (format, of_down))
        x = fix(x, DTYPE, order)
        return experts.gated(x, gate, up, ids, ACTIVATION, DTYPE, of_hidden, width)

    def xla(x, gate, up, ids):
        x = x[:, None]
        return ACTIVATION(*(expert_matmul(x, w, ids, DTYPE) for w in (gate, up)))

    def nbytes(width, x, gate, up, ids):
        return x.nbytes // DECODE_ROWS * width + read((gate, up), width, ids)

    return Case(
        "experts", what, draw, run, xla, nbytes, WIDTHS, ("fix",),
        shape=_shape(format, f"{FFN}+{FFN}", HIDDEN, 1),
    )  # fmt: skip


def down(format: str, what: str) -> Case:
    """Return the case of `experts.weighed`, as `gated`."""

    def draw():
        ids = chosen()
        x = normal(0, *ids.shape, FFN, dtype=DTYPE)
        w = random_weight(1, format, (EXPERTS, HIDDEN, FFN))
        return x, w, ids, normal(1, *ids.shape)

    def run(width, x, w, ids, share):
        x = fix(x.reshape(-1, FFN), DTYPE, experts.FORMATS[format].order)
        return experts.weighed(x, w, ids, share, width)

    def xla(x, w, ids, share):
        return jnp.sum(share[..., None] * expert_matmul(x, w, ids, DTYPE), 1)

    def nbytes(width, x, w, ids, share):
        return x.nbytes // DECODE_ROWS * width + read([w], width, ids)

    def exact(x, w, ids, share):
        part = jax.tree.map(lambda plane: plane[ids, :COMPARED], w)
        w = np.asarray(dequantize(part), np.float64)
        found = (w @ np.asarray(x, np.float64)[..., None])[..., 0]
        return (np.asarray(share, np.float64)[..., None] * found).sum(1)

    return Case(
        "experts", what, draw, run, xla, nbytes, WIDTHS, ("fix",), exact=exact,
        shape=_shape(format, str(HIDDEN), FFN, 1),
    )  # fmt: skip


def moe() -> Case:
    """Return the case of a layer's second half: streams, router and experts."""
    config = dataclasses.replace(ModelConfig.flash(), dtype=DTYPE)
    m, maps = config.hc_streams, config.hc_streams * (2 + config.hc_streams)

    def connection():
        sizes = (m, HIDDEN), (HIDDEN,), (m,), (m, m)
        streams, output, post, mix = (
            normal(i, DECODE_ROWS, *size) for i, size in enumerate(sizes, 10)
        )
        fn = random_weight(8, "F16", (maps, m * HIDDEN))
        return streams, ((output,), post, mix), fn, normal(14, maps), normal(15, 3)

    def draw():
        into, out = (FFN, HIDDEN), (HIDDEN, FFN)
        routed = ("IQ2_XXS", into), ("IQ2_XXS", into), ("Q2_K", out)
        weights = [
            random_weight(i, name, (EXPERTS, *shape))
            for i, (name, shape) in enumerate(routed, 1)
        ]
        shared = [
            random_weight(i, "Q8_0", s) for i, s in enumerate((into, into, out), 4)
        ]
        router = random_weight(7, "F16", (EXPERTS, HIDDEN))
        both = experts.Experts(*weights), experts.Experts(*shared)
        return connection(), normal(0, HIDDEN), router, *both

    def run(width, of_streams, norm, router, routed, shared):
        reading = Reading(*of_streams, norm=norm, config=config)
        own = Router(router, jnp.zeros(EXPERTS), USED, 1.5, 2.0**-14)
        # Without a GPU it is only traced.
        operands = own, routed, shared, ACTIVATION
        programs = moe_ptx.programs(reading, *operands) or 1
        return moe_ptx.multiply(reading, None, *operands, width, programs)

    def route(x, router):
        probability = jnp.sqrt(jax.nn.softplus(quant_matmul(x, router)))
        picked, ids = jax.lax.top_k(probability, USED)
        return ids, picked / jnp.sum(picked, 1, keepdims=True) * 1.5

    def read_streams(of_streams, norm):
        streams, (parts, *others), *weights = of_streams
        names = (f"{name}.weight" for name in ("fn", "base", "scale"))
        connection = HyperConnection(config, dict(zip(names, weights, strict=True)))
        update = Update(parts, *others)
        one = jax.tree.map(lambda array: array[None], (streams, update))
        x, _, *others = connection(*one, RMSNorm(norm, config.rms_eps))
        return [array[0] for array in (x, *others)]

    def xla(of_streams, norm, router, routed, shared):
        x, *others = read_streams(of_streams, norm)
        ids, share = route(x, router)
        product = lambda x, w: expert_matmul(x, w, ids, DTYPE)  # noqa: E731
        dense = lambda x, w: quant_matmul(x, w, DTYPE)  # noqa: E731
        found = ACTIVATION(
            product(x[:, None], routed.gate), product(x[:, None], routed.up)
        )
        found = jnp.sum(share[..., None] * product(found, routed.down), 1)
        own = ACTIVATION(dense(x, shared.gate), dense(x, shared.up))
        return dense(own, shared.down), found, ids, *others

    def nbytes(width, of_streams, norm, router, routed, shared):
        of_streams, *others = jax.tree.map(jnp.asarray, (of_streams, norm, router))
        x, *_ = read_streams(of_streams, others[0])
        ids, _ = route(x, others[1])
        of_rows, weights = of_streams[:2], (*of_streams[2:], *others, *shared)
        rows = sum(array.nbytes for array in jax.tree.leaves(of_rows))
        of_all = rows // DECODE_ROWS * width + sum(w.nbytes for w in weights)
        return of_all + read(routed, width, ids)

    return Case(
        "moe_ptx", "streams, router, experts", draw, run, xla, nbytes, WIDTHS, ONCE,
        shape=_shape("F16, IQ2_XXS, Q2_K, Q8_0", str(HIDDEN), HIDDEN, 1),
    )  # fmt: skip


def chosen() -> jax.Array:
    """Return the experts of rows, [R, U]; those of WIDTHS choose different ones."""
    most = WIDTHS[-1]
    ids = jax.random.permutation(jax.random.key(9), EXPERTS)[: most * USED]
    padding = (0, DECODE_ROWS - most), (0, 0)
    return jnp.pad(ids.reshape(most, USED).astype(jnp.int32), padding, "edge")


def read(weights: Any, width: int, ids: jax.Array) -> float:
    """Return the bytes of the experts that the first rows chose."""
    count = len(np.unique(ids[:width]))
    return sum(w.nbytes // w.shape[0] * count for w in weights)


def _shape(format: str, out: str, into: int, groups: int) -> dict[str, Any]:
    return dict(format=format, out=out, into=into, groups=groups)


CASES = [
    dense("Q8_0", "LM head", [129280], 4096),
    dense("Q8_0", "attn_q_b", [32768], 1024),
    into_fixed_point("attn_output_a", 8192, 4096, 8),
    dense("Q8_0", "attn_output_b", [4096], 8192),
    two_maps("attn_output_a, _b", 8192, 4096, 4096, 8),
    dense("Q8_0", "attn_q_a, attn_kv", [1024, 512], 4096),
    dense("F16", "indexer query", [8192], 1024),
    dense("F16", "CSA compressor", [1024, 1024], 4096),
    dense("F16", "HCA compressor", [512, 512], 4096),
    dense("F16", "indexer compressor", [256, 256], 4096),
    dense("F16", "indexer heads", [64], 4096),
    dense("F16", "router", [256], 4096),
    dense("Q8_0", "shared gate, up", [2048, 2048], 4096),
    dense("Q8_0", "shared down", [4096], 2048),
    gated("IQ2_XXS", "expert gate, up", "Q2_K"),
    down("Q2_K", "expert down, added up"),
    moe(),
    gated("Q4_K", "expert gate, up", "Q4_K"),
    down("Q4_K", "expert down, added up"),
]
