"""The products of decode passes of DeepSeek-V4-Flash, as cases of `kernel_times.py`.

A case is what one launch multiplies, a weight or several of the same input: dense ones,
and those of experts, six for each row and all different.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_case import DTYPE, Case, normal

from ds4jax import synthetic
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.pallas import experts, q8_0
from ds4jax.pallas.fixed_point import fix
from ds4jax.pallas.matmul import (
    expert_matmul,
    grouped_matmul,
    quant_matmul,
    quant_matmuls,
    two_maps_kernel,
)
from ds4jax.pallas.passes import DecodePass, within
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
        shape=shape_of(format, "+".join(map(str, outs)), k, 1),
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
        shape=shape_of("Q8_0", str(n), k, groups),
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
        shape=shape_of("Q8_0", f"{middle}, {n}", k, groups),
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
        shape=shape_of(format, f"{FFN}+{FFN}", HIDDEN, 1),
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
        shape=shape_of(format, str(HIDDEN), FFN, 1),
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


def shape_of(format: str, out: str, into: int, groups: int) -> dict[str, Any]:
    """Return the columns that only products have."""
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
    gated("Q4_K", "expert gate, up", "Q4_K"),
    down("Q4_K", "expert down, added up"),
]
