"""Blocks of decode passes of DeepSeek-V4-Flash, as cases of `kernel_times.py`.

A case is one launch that reads a hyper connection's streams, and then multiplies what
that gives.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from kernel_case import DTYPE, Case, normal
from kernel_products import (
    ACTIVATION,
    EXPERTS,
    FFN,
    HIDDEN,
    ONCE,
    USED,
    WIDTHS,
    random_weight,
    read,
    shape_of,
)

from ds4jax.config import ModelConfig
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm
from ds4jax.pallas import attn_maps, experts, moe_ptx
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.matmul import expert_matmul, quant_matmul
from ds4jax.pallas.router import Router

CONFIG = dataclasses.replace(ModelConfig.flash(), dtype=DTYPE)

TRACED = 132
"""Programs where there is no GPU, and a case is only traced."""


def drawn_streams() -> tuple[Any, ...]:
    """Return streams, an update, and a hyper connection's weights but for the norm."""
    m = CONFIG.hc_streams
    maps, sizes = m * (2 + m), ((m, HIDDEN), (HIDDEN,), (m,), (m, m))
    streams, output, post, mix = (
        normal(i, DECODE_ROWS, *size) for i, size in enumerate(sizes, 10)
    )
    fn = random_weight(8, "F16", (maps, m * HIDDEN))
    return streams, ((output,), post, mix), fn, normal(14, maps), normal(15, 3)


def read_streams(of_streams: tuple[Any, ...], norm: jax.Array) -> list[jax.Array]:
    """Return by XLA's operations a block's input, the streams, and its weights."""
    streams, (parts, *others), *weights = of_streams
    names = (f"{name}.weight" for name in ("fn", "base", "scale"))
    connection = HyperConnection(CONFIG, dict(zip(names, weights, strict=True)))
    update = Update(parts, *others)
    one = jax.tree.map(lambda array: array[None], (streams, update))
    x, _, *others = connection(*one, RMSNorm(norm, CONFIG.rms_eps))
    return [array[0] for array in (x, *others)]


def stream_bytes(width: int, of_streams: tuple[Any, ...]) -> int:
    """Return the bytes of that: of the first rows, and of all weights."""
    rows = sum(array.nbytes for array in jax.tree.leaves(of_streams[:2]))
    return rows // DECODE_ROWS * width + sum(w.nbytes for w in of_streams[2:])


def attention_input(what: str, compressors: list[int], indexed: bool) -> Case:
    """Return the case of all maps of the input of one kind of layer.

    Args:
      what: it is.
      compressors: rows of each of a compressor's two maps.
      indexed: whether the indexer has maps too.
    """
    floats = [n for n in compressors for _ in range(2)] + [64] * indexed
    names = ["Q8_0"] * 2 + ["F16"] * len(floats)
    outs = [CONFIG.q_lora, CONFIG.head_dim, *floats]
    queries = [("Q8_0", CONFIG.heads * CONFIG.head_dim)] + [("F16", 8192)] * indexed

    def draw():
        first = [
            random_weight(i, name, (n, HIDDEN))
            for i, (name, n) in enumerate(zip(names, outs, strict=True), 20)
        ]
        second = [
            random_weight(i, name, (n, CONFIG.q_lora))
            for i, (name, n) in enumerate(queries, 40)
        ]
        norms = normal(0, HIDDEN), normal(1, CONFIG.q_lora)
        return drawn_streams(), *norms, first, second

    def run(width, of_streams, norm, of_latent, first, second):
        reading = Reading(*of_streams, norm=norm, config=CONFIG)
        maps = attn_maps.Maps(first, (of_latent, CONFIG.rms_eps), second)
        programs = attn_maps.programs(reading, maps) or TRACED
        return attn_maps.multiply(reading, maps, width, programs)

    def xla(of_streams, norm, of_latent, first, second):
        x, *others = read_streams(of_streams, norm)
        found = [quant_matmul(x, w, DTYPE) for w in first]
        latent = RMSNorm(of_latent, CONFIG.rms_eps)(found[0])
        found += [quant_matmul(latent, w, DTYPE) for w in second]
        return found, *others

    def nbytes(width, of_streams, norm, of_latent, first, second):
        weights = norm, of_latent, *first, *second
        return stream_bytes(width, of_streams) + sum(w.nbytes for w in weights)

    return Case(
        "attn_maps", what, draw, run, xla, nbytes, WIDTHS, ONCE,
        shape=shape_of("F16, Q8_0", "_".join(map(str, outs)), HIDDEN, 1),
    )  # fmt: skip


def moe() -> Case:
    """Return the case of a layer's second half: streams, router and experts."""

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
        return drawn_streams(), normal(0, HIDDEN), router, *both

    def run(width, of_streams, norm, router, routed, shared):
        reading = Reading(*of_streams, norm=norm, config=CONFIG)
        own = Router(router, jnp.zeros(EXPERTS), USED, 1.5, 2.0**-14)
        operands = own, routed, shared, ACTIVATION
        programs = moe_ptx.programs(reading, *operands) or TRACED
        return moe_ptx.multiply(reading, None, *operands, width, programs)

    def route(x, router):
        probability = jnp.sqrt(jax.nn.softplus(quant_matmul(x, router)))
        picked, ids = jax.lax.top_k(probability, USED)
        return ids, picked / jnp.sum(picked, 1, keepdims=True) * 1.5

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
        dense = sum(w.nbytes for w in (*others, *shared))
        return stream_bytes(width, of_streams) + dense + read(routed, width, ids)

    return Case(
        "moe_ptx", "streams, router, experts", draw, run, xla, nbytes, WIDTHS, ONCE,
        shape=shape_of("F16, IQ2_XXS, Q2_K, Q8_0", str(HIDDEN), HIDDEN, 1),
    )  # fmt: skip


CASES = [
    attention_input("streams, dense layer's input", [], indexed=False),
    attention_input("streams, CSA layer's input", [1024, 256], indexed=True),
    attention_input("streams, HCA layer's input", [512], indexed=False),
    moe(),
]
