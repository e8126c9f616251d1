"""The kernels of decode passes that are not products, as cases of `kernel_times.py`.

A case is the function of the model that a kernel serves, with weights and a state as
DeepSeek-V4-Flash has them.  What it is compared with is the same function when the
kernel's module alone says that it does not serve.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from kernel_case import DTYPE, Case, choice, normal
from kernel_products import ONCE

from ds4jax import schema, synthetic
from ds4jax.config import CSA_RATIO, ModelConfig, QuantPlan
from ds4jax.model import cache
from ds4jax.model.attention import Attention, Source
from ds4jax.model.cache import DECODE_ROWS, Rows
from ds4jax.model.compressor import Compressor
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import RMSNorm, scope
from ds4jax.model.moe import MoE
from ds4jax.model.rope import turn
from ds4jax.pallas import (
    attention,
    attn_out,
    compressor,
    hyper_connection,
    indexer,
    kept_row,
    router,
)
from ds4jax.pallas.fixed_point import LIMBS, cut, fix, power_above, unit
from ds4jax.pallas.passes import DecodePass, Pass, within

CONFIG = ModelConfig.flash(
    layers=3, compress_ratios=(0, 4, 128), hash_layers=0, dtype=DTYPE
)
"""A layer of each kind, routed by what is in the rows."""

DENSE, CSA, HCA = range(3)
SHORT, LONG = 2048, 65536
"""Tokens before the passes."""

FLOAT = 4
"""Bytes of a number in a state, and of one between kernels."""

HEADS = CONFIG.heads * CONFIG.head_dim


def weights(layer: int, *prefixes: str, plan: str = "ds4-q2") -> dict[str, Any]:
    """Return the weights of a layer whose names begin so, without the layer's name."""
    types, found = QuantPlan.named(plan).types, {}
    for full_name, spec in schema.trunk(CONFIG).items():
        _, is_of_layer, name = full_name.partition(f"blk.{layer}.")
        if is_of_layer and name.startswith(prefixes):
            found[name] = synthetic.tensor(CONFIG, name, spec, types[spec.group])
    return found


def padded(own: dict[str, Any]) -> dict[str, Any]:
    """Return weights for a module that does nothing with those that are not there."""
    return collections.defaultdict(lambda: jnp.zeros(()), own)


def dense_attention(own: dict[str, Any]) -> Attention:
    """Return the attention of a layer without a compressor."""
    return Attention(CONFIG, 0, padded(own))


def pair(
    kernel: ModuleType, kind: Callable[[int], Pass], run: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `run` of a case as its kernel does it, and as XLA does.

    Args:
      kernel: which serves `run`.
      kind: of pass, given its width.
      run: given the width and the operands.
    """

    def by_kernel(width, *operands):
        with within(kind(width)):
            return run(width, *operands)

    def by_xla(*operands):
        nothing = {
            name: mock.Mock(return_value=False)
            for name in vars(kernel)
            if name.startswith("serves")
        }
        with mock.patch.multiple(kernel, **nothing):
            return by_kernel(1, *operands)

    return by_kernel, by_xla


def part(
    kernel: ModuleType,
    what: str,
    draw: Callable[[], tuple[Any, ...]],
    run: Callable[..., Any],
    nbytes: Callable[..., float],
    kind: Callable[[int], Pass] = lambda width: DecodePass(width, jnp.int32(width)),
    **more: Any,
) -> Case:
    """Return the case of a part of passes of a kind; `more` is as of `Case`."""
    name = kernel.__name__.rpartition(".")[2]
    both = pair(kernel, kind, run)
    return Case(name, what, draw, *both, nbytes, **more)


def decode_rows(start: jax.Array, width: int) -> Rows:
    """Return the rows of a decode pass at `start`, [1]."""
    offset = jnp.minimum(jnp.arange(DECODE_ROWS), width - 1)
    count = jnp.full_like(start, width)
    return Rows(start, count, start[:, None] + offset, is_decode=True)


def place(start: int) -> jax.Array:
    """Return where a pass begins, as a state has it."""
    return jnp.full(1, start, jnp.int32)


def fixed() -> list[Case]:
    """Return the cases of `fix`, which takes all rows of a pass whatever its width."""

    def xla(x):
        x = x.astype(DTYPE).astype(jnp.float32).reshape(len(x), -1, 2, 4, 4)
        power = power_above(jnp.max(jnp.abs(x), (2, 3, 4)))
        words = cut(x, power[..., None, None, None], LIMBS[DTYPE])
        sums = jnp.sum(x, (3, 4))
        return jnp.stack(words, 1), power / unit(LIMBS[DTYPE]), sums

    def case(what, vectors, size):
        return Case(
            "fixed_point",
            what,
            lambda: (normal(0, DECODE_ROWS * vectors, size),),
            lambda width, x: fix(x, DTYPE),
            xla,
            lambda width, x: x.nbytes,
            (DECODE_ROWS,),
        )

    return [
        case("hidden rows", 1, CONFIG.hidden),
        case("heads by groups", CONFIG.o_groups, HEADS // CONFIG.o_groups),
    ]


def streams_read() -> Case:
    """Return the case of a hyper connection's reading."""

    def draw():
        m, d = CONFIG.hc_streams, CONFIG.hidden
        sizes = [(m, d), (d,), (d,), (m,), (m, m)]
        drawn = [normal(i, 1, DECODE_ROWS, *size) for i, size in enumerate(sizes)]
        own = weights(DENSE, "hc_attn_", "attn_norm")
        return own, drawn[0], Update(tuple(drawn[1:3]), *drawn[3:])

    def run(width, own, streams, update):
        norm = RMSNorm(own["attn_norm.weight"], CONFIG.rms_eps)
        connection = HyperConnection(CONFIG, scope(own, "hc_attn_"))
        return connection(streams, update, norm)

    def nbytes(width, own, streams, update):
        of_weights = sum(w.nbytes for w in own.values())
        of_rows = sum(a.nbytes for a in jax.tree.leaves((streams, update)))
        return of_weights + of_rows // DECODE_ROWS * width

    case = part(hyper_connection, "read", draw, run, nbytes)
    # In a decode pass another kernel would multiply by the map, which is in both.
    return dataclasses.replace(case, xla=functools.partial(run, 1))


def attended(
    kernel: ModuleType, what: str, context: int, compressed: int = 0, used: int = 0
) -> Case:
    """Return the case of attention over a window and compressed rows.

    Args:
      kernel: with the output's maps or without.
      what: it is.
      context: tokens before.
      compressed: how many rows there are.
      used: how many of these each query chose, 0 for all.
    """
    window, k, with_maps = CONFIG.window, CONFIG.head_dim, kernel is attn_out

    def draw():
        ring = window + cache.DEFAULT_SLACK
        visible = jnp.broadcast_to(jnp.arange(ring) < window, (1, DECODE_ROWS, ring))
        sources = [Source(normal(1, 1, ring, k), visible)]
        if compressed:
            index = choice(2, DECODE_ROWS, compressed, used) if used else None
            visible = jnp.ones((1, DECODE_ROWS, used or compressed), bool)
            sources.append(Source(normal(3, 1, compressed, k), visible, index))
        query = normal(0, 1, DECODE_ROWS, CONFIG.heads, k)
        names = ["attn_sinks"] + ["attn_output_"] * with_maps
        return weights(DENSE, *names), query, sources, place(context)

    def run(width, own, query, sources, start):
        layer, positions = dense_attention(own), decode_rows(start, width).positions
        if with_maps:
            return layer._attend(query, sources, positions)
        given = query, sources, turn(positions, layer.table)
        query, sources, turned = jax.tree.map(lambda array: array[0], given)
        sinks, sizes = layer.sinks.get_value(), (DTYPE, CONFIG.o_groups, width)
        return attention.attend(query, sources, sinks, turned, CONFIG.rms_eps, *sizes)

    def xla(own, query, sources, start):
        layer, positions = dense_attention(own), decode_rows(start, 1).positions
        query = layer._prepare_queries(query, positions)
        heads = layer._heads(query, sources, positions)
        return layer._project(heads) if with_maps else heads

    def nbytes(width, own, *_):
        rows = window + (min(width * used, compressed) if used else compressed)
        maps = sum(w.nbytes for w in own.values()) if with_maps else 0
        return (rows * k + width * HEADS) * FLOAT + maps

    case = part(kernel, what, draw, run, nbytes, others=ONCE)
    return dataclasses.replace(case, xla=xla)


def routed() -> Case:
    """Return the case of the choice of experts, of logits."""

    def draw():
        own = weights(DENSE, "ffn_gate_inp", "exp_probs_b")
        return own, normal(0, 1, DECODE_ROWS, CONFIG.hidden)

    def run(width, own, x):
        tokens = jnp.zeros((1, DECODE_ROWS), jnp.int32)
        return MoE(CONFIG, False, padded(own)).route(x, tokens)

    def nbytes(width, own, x):
        return (1 + width) * CONFIG.experts * FLOAT

    return part(router, "route", draw, run, nbytes, others=("plain",))


def state(layer: int, context: int, name: str) -> cache.CompressorCache:
    """Return the random state of a layer's `compressor` or `indexer`."""
    make = lambda: cache.empty(CONFIG, context)  # noqa: E731
    empty = getattr(jax.eval_shape(make).layers[layer], name)
    return jax.tree.map(lambda array: normal(7, *array.shape), empty)


def kept() -> Case:
    """Return the case of the row that attention keeps, behind its projection.

    By what it is rotated all layers of a pass ask for together, so it is given.
    """

    def draw():
        row = normal(0, 1, DECODE_ROWS, CONFIG.head_dim)
        ring = normal(1, 1, CONFIG.window + cache.DEFAULT_SLACK, CONFIG.head_dim)
        own, start = weights(DENSE, "attn_kv_a_norm"), place(SHORT)
        positions = decode_rows(start, DECODE_ROWS).positions[0]
        return own, row, ring, turn(positions, dense_attention(own).table), start

    def run(width, own, row, ring, turned, start):
        norm = dense_attention(own).kv_norm.weight.get_value()
        given = row[0], start, start + width, ring[0], norm, turned, CONFIG.rms_eps
        return kept_row.keep(*given)

    def xla(own, row, ring, turned, start):
        before = cache.LayerCache(ring)
        return dense_attention(own).append(row, before, decode_rows(start, 1))[1]

    def nbytes(width, *operands):
        return 2 * width * CONFIG.head_dim * FLOAT

    case = part(kept_row, "window", draw, run, nbytes, donated=(2,))
    return dataclasses.replace(case, xla=xla)


def compressed(what: str, layer: int, name: str, start: int) -> Case:
    """Return the case of a compressor, behind its projections.

    Args:
      what: it is.
      layer: whose it is.
      name: `compressor` or `indexer`.
      start: where the pass begins, which ends a window in passes of any width or none.
    """
    ratio = CONFIG.compress_ratios[layer]
    size = CONFIG.head_dim if name == "compressor" else CONFIG.index_dim
    prefix = "attn_compressor_" if name == "compressor" else "indexer_compressor_"
    halves = 2 if ratio == CSA_RATIO else 1
    ends = (start + 1) % ratio == 0

    def draw():
        x = normal(0, 1, DECODE_ROWS, CONFIG.hidden, dtype=DTYPE)
        own = scope(weights(layer, prefix), prefix)
        return own, x, state(layer, SHORT, name), place(start)

    def run(width, own, x, before, start):
        of_layer = Compressor(CONFIG, ratio, size, own)
        rows = decode_rows(start, width)
        return of_layer(x, before, rows, lambda row: row)[1]

    def nbytes(width, *operands):
        # A value and a gate of each position, its half of the channels if there are
        # two; the pass's own ones of all channels.
        pooled = halves * ratio * size if ends else 0
        return 2 * (width * halves * size + pooled) * FLOAT

    what = f"{what}, {'a window ends' if ends else 'none ends'}"
    return part(
        compressor, what, draw, run, nbytes, others=("plain",), donated=(2,)
    )  # fmt: skip


def picked(context: int) -> Case:
    """Return the case of an indexer's scores and choice, behind what it is made of."""
    c = CONFIG

    def draw():
        x, q_lora = (
            normal(i, 1, DECODE_ROWS, size, dtype=DTYPE)
            for i, size in enumerate((c.hidden, c.q_lora))
        )
        before = state(CSA, context, "indexer")
        return weights(CSA, "indexer"), x, q_lora, before, place(context)

    def run(width, own, x, q_lora, before, start):
        rows = decode_rows(start, width)
        return Indexer(c, own)(x, q_lora, before, rows)

    def nbytes(width, own, x, q_lora, before, start):
        # Of keys that are all chosen there is nothing to be known.
        keys = before.rows.nbytes if before.rows.shape[1] > c.index_topk else 0
        return keys + width * c.index_heads * (c.index_dim + 1) * FLOAT

    return part(
        indexer, f"scores and choice at {context:,}", draw, run, nbytes,
        others=("plain", "compress"), donated=(3,),
    )  # fmt: skip


ATTENDED = (
    ("dense", (SHORT,)),
    (f"CSA at {LONG:,}", (LONG, LONG // 4, CONFIG.index_topk)),
    (f"HCA at {SHORT:,}", (SHORT, SHORT // 128)),
    (f"HCA at {LONG:,}", (LONG, LONG // 128)),
)
"""Kinds of layers: tokens before, compressed rows, and how many a query chose."""

CASES = [
    *fixed(),
    streams_read(),
    *(attended(attention, f"attend, {what}", *sizes) for what, sizes in ATTENDED),
    *(attended(attn_out, f"output, {what}", *sizes) for what, sizes in ATTENDED),
    routed(),
    kept(),
    *(
        compressed(f"{what} {ratio}x{size}", layer, name, start)
        for what, ratio, size, layer, name in (
            ("CSA", 4, 512, CSA, "compressor"),
            ("indexer", 4, 128, CSA, "indexer"),
            ("HCA", 128, 512, HCA, "compressor"),
        )
        for start in (SHORT - 128, SHORT - 1)
    ),
    picked(SHORT),
    picked(LONG),
]
