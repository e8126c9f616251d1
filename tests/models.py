"""Small random models that the tests share, and their passes compiled once.

A pass is compiled for each pair of a model's config and a width, which takes seconds,
so tests call the functions here, fill short passes up to a common width with `count`,
and keep to the configurations that others use.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import schema
from ds4jax.config import ModelConfig
from ds4jax.model import cache as caches
from ds4jax.model.cache import Cache, LayerCache
from ds4jax.model.deepseek import Model, build, random_weights

SLACK = 12
"""Of `fresh`: rings small enough for short texts to wrap."""


def micro_config(**changes) -> ModelConfig:
    """Return the smallest model that has every kind of layer and router.

    One layer each of dense (hash-routed), CSA and HCA; a text of 50 tokens fills every
    ring and has more compressed rows than the indexer picks.  Sinkhorn's iterations
    are few because they take most of the time to compile.
    """
    micro: dict[str, Any] = dict(
        vocab=96, hidden=64, layers=3, heads=4, head_dim=32, rope_dim=16,
        q_lora=32, o_lora=16, o_groups=2, window=16, compress_ratios=(0, 4, 16),
        index_heads=4, index_dim=16, index_topk=4,
        experts=6, experts_used=2, expert_ffn=32, hash_layers=1,
        sinkhorn_iters=3, swiglu_limit=1.5,
    )  # fmt: skip
    return ModelConfig(**(micro | changes))


def slim_config(**changes) -> ModelConfig:
    """Return the CSA layer of the micro model alone, which compiles in half the time.

    For claims about what is done with a model, whatever its layers are.
    """
    return micro_config(layers=1, compress_ratios=(4,), **changes)


def lively_weights(
    specs: dict[str, schema.TensorSpec], config: ModelConfig, seed: int
) -> dict[str, np.ndarray]:
    """Return random weights in which no part is neutral, as it is before training."""
    rng = np.random.default_rng([seed, 1])
    weights = random_weights(specs, config, seed)
    for name, spec in specs.items():
        if spec.group == "vector":
            weights[name] += 0.3 * rng.standard_normal(spec.shape, np.float32)
        elif "hc_" in name or name.endswith("ape.weight"):
            weights[name] = rng.standard_normal(spec.shape, np.float32)
            weights[name] *= spec.shape[-1] ** -0.5 if "hc_" in name else 1
    return weights


@functools.cache
def lively(config: ModelConfig, seed: int = 0) -> Model:
    """Return a model of `lively_weights` with its MTP head."""
    trunk = lively_weights(schema.trunk(config), config, seed)
    return build(config, trunk, lively_weights(schema.mtp(config), config, seed + 1))


def text(config: ModelConfig, tokens: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Return random token ids [batch, tokens]."""
    rng = np.random.default_rng([seed, tokens])
    return rng.integers(config.vocab, size=(batch, tokens), dtype=np.int32)


def fresh(
    config: ModelConfig, max_context: int = 96, batch: int = 1, mtp: bool = False
) -> Cache:
    """Return an empty cache of the trunk, or of the MTP head."""
    ratios = (0,) if mtp else None
    return caches.empty(config, max_context, batch, SLACK, ratios)


@jax.jit
def trunk(model: Model, tokens, cache=None, count=None):
    """Run `Trunk`, compiled."""
    return model.modules().trunk(tokens, cache, count)


@jax.jit
def mtp(model: Model, tokens, streams, cache=None, count=None):
    """Run `MTPHead`, compiled."""
    modules = model.modules()
    assert modules.mtp
    return modules.mtp(modules.trunk, tokens, streams, cache, count)


def poison(cache: Cache, config: ModelConfig, value: float = np.nan) -> Cache:
    """Return `cache` with `value` in all that no later row may see.

    This restates, one slot at a time and without the code under test, what is live
    when `length` tokens are committed.
    """
    lengths = np.asarray(cache.length)

    def blank(store, is_live):
        store = np.array(store)
        for sequence, length in enumerate(lengths):
            for slot in range(store.shape[1]):
                if not is_live(slot, int(length)):
                    store[sequence, slot] = value
        return jnp.asarray(store)

    def ring(store, oldest):
        size = store.shape[1]

        def live(slot, n):
            return slot in {t % size for t in range(max(oldest(n), 0), n)}

        return blank(store, live)

    def compressor(state, ratio):
        if state is None:
            return None
        halves = 2 if ratio == 4 else 1
        return state.replace(
            inputs=ring(state.inputs, lambda n: (n // ratio - halves + 1) * ratio),
            rows=blank(state.rows, lambda row, n: row < n // ratio),
        )

    return dataclasses.replace(
        cache,
        layers=tuple(
            LayerCache(
                ring(layer.raw, lambda n: n - config.window + 1),
                compressor(layer.compressor, ratio),
                compressor(layer.indexer, ratio),
            )
            # The head's one layer compresses nothing, whatever the ratio.
            for layer, ratio in zip(cache.layers, config.compress_ratios, strict=False)
        ),
    )


def assert_same(actual, expected, *, what: str = ""):
    """Compare two pytrees bit for bit, naming the leaf that differs; NaN equals NaN.

    `what` they are is told before the leaf.
    """
    expected = dict(jax.tree_util.tree_leaves_with_path(expected))
    actual = dict(jax.tree_util.tree_leaves_with_path(actual))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(
            np.asarray(leaf), expected[path], err_msg=what + jax.tree_util.keystr(path)
        )


def assert_same_state(actual: Cache, expected: Cache, config: ModelConfig):
    """Compare what later rows can see of two caches, bit for bit."""
    assert_same(poison(actual, config), poison(expected, config))


def quiet(config: ModelConfig, share: float) -> Model:
    """Return the lively model with logits of `share` their size.

    Sampling then goes by its noise, which drafts share: many of them are right.
    """
    model = lively(config)
    soft = lambda weights, name: weights | {name: weights[name] * share}  # noqa: E731
    return dataclasses.replace(
        model,
        trunk=soft(model.trunk, "output_norm.weight"),
        mtp=soft(model.mtp, "mtp.0.norm.weight"),
    )
