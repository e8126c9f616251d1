"""A whole model: its weights by name, and the Flax modules over them."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx, struct
from jaxtyping import Array

from ds4jax import schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan, mtp_plan
from ds4jax.model.layers import Weights
from ds4jax.model.mtp import MTPHead
from ds4jax.model.trunk import Trunk
from ds4jax.pallas.passes import Weight
from ds4jax.quant import QuantTensor, dequantize


class DeepSeek(nnx.Module):
    """The trunk and, where there is one, the MTP head."""

    def __init__(self, config: ModelConfig, trunk: Weights, mtp: Weights | None = None):
        self.trunk = Trunk(config, trunk)
        self.mtp = MTPHead(config, mtp) if mtp else None


@struct.dataclass
class Model:
    """The weights of a model, by file name: what jit takes as an argument.

    The Flax modules are put together from it inside a trace, which costs nothing at
    run time and keeps one naming from file to device and back.

    Attributes:
      trunk: every tensor of `schema.trunk(config)`.
      mtp: every tensor of `schema.mtp(config)`; empty for no head.
      config: static.
    """

    trunk: dict[str, Weight]
    mtp: dict[str, Weight]
    config: ModelConfig = struct.field(pytree_node=False)

    def modules(self) -> DeepSeek:
        """Return the modules over these weights, to be called."""
        return DeepSeek(self.config, self.trunk, self.mtp)


def build(
    config: ModelConfig,
    trunk: Mapping[str, Weight],
    mtp: Mapping[str, Weight] | None = None,
    packed: bool = False,
) -> Model:
    """Build a model from weights by the names of `schema.py`, on the default device.

    Args:
      config: the architecture, and the numerics to run it with.
      trunk: every tensor of `schema.trunk(config)`.
      mtp: every tensor of `schema.mtp(config)`, or nothing for no head.
      packed: keep quantised tensors as they are and dequantise them in each pass,
        rather than once here; less memory, more arithmetic, the same bits.
    """

    place_all = lambda weights: {n: place(w, packed) for n, w in weights.items()}  # noqa: E731
    return Model(place_all(trunk), place_all(mtp or {}), config)


def place(weight: Weight, packed: bool = False) -> Weight:
    """Put one weight on the default device, as `build` does, and wait for it.

    Given to `gguf.load_trunk` and `gguf.load_mtp`, it keeps the host from holding more
    than one tensor; `build` then leaves what is in place as it is.

    Args:
      weight: of any type.  If it is numpy's it must not change afterwards: the CPU may
        use its memory as it is.
      packed: as of `build`.
    """
    quantised = isinstance(weight, QuantTensor) or weight.dtype.itemsize == 2
    # Not `jnp.asarray`, which first copies on the host.
    put = lambda plane: plane if isinstance(plane, Array) else jax.device_put(plane)  # noqa: E731
    placed = jax.block_until_ready(jax.tree.map(put, weight))
    # JAX lets go of what it copied from when Python next collects garbage.
    gc.collect(0)
    return dequantize(placed) if quantised and not packed else placed


def random_weights(
    specs: Mapping[str, schema.TensorSpec], config: ModelConfig, seed: int
) -> dict[str, np.ndarray]:
    """Return fresh float32 weights to train from or to test with, by name.

    Matrices are normal with deviation `1 / sqrt(in)`, embeddings 1; the second
    matrix of each block starts smaller, so that blocks start near silence.  Norms are
    1, hash tables spread tokens evenly over the experts.
    """
    rng = np.random.default_rng(seed)
    quiet = 1 / np.sqrt(2 * config.layers)

    def draw(name: str, spec: schema.TensorSpec) -> np.ndarray:
        if spec.group == "table":
            order = [rng.permutation(config.experts) for _ in range(spec.shape[0])]
            return np.array(order, np.int32)[:, : config.experts_used]
        if spec.group == "vector":
            return schema.neutral(config, name, spec.shape)
        deviation = 1.0 if name == "token_embd.weight" else spec.shape[-1] ** -0.5
        if "_down_" in name or "attn_output_b" in name:
            deviation *= quiet
        elif "hc_" in name or name.endswith("ape.weight"):
            deviation = 0.02
        return rng.normal(0, deviation, spec.shape).astype(np.float32)

    return {name: draw(name, spec) for name, spec in specs.items()}


def random_model(config: ModelConfig, seed: int = 0, mtp: bool = True) -> Model:
    """Return a model of random weights: the whole computation, no knowledge."""
    trunk = random_weights(schema.trunk(config), config, seed)
    head = random_weights(schema.mtp(config), config, seed + 1) if mtp else None
    return build(config, trunk, head)


def synthetic_model(
    config: ModelConfig, plan: str, seed: int = 0, *, mtp: bool = False
) -> Model:
    """Return a model of `synthetic.weights`, made packed on the default device.

    It has a real model's bytes and none of its knowledge: for measuring speed and
    memory where there is no file.

    Args:
      config: the architecture; see `synthetic.shorten`.
      plan: name of the trunk's layout, one of PLANS; the head's follows from it.
      seed: of the weights.
      mtp: whether it has a head.

    Raises:
      ConfigError: for an unknown plan, or as `synthetic.tensor`.
    """
    trunk = synthetic.weights(config, QuantPlan.named(plan), seed)
    own = QuantPlan.named(mtp_plan(plan))
    head = synthetic.weights(config, own, seed, mtp=True) if mtp else None
    return build(config, trunk, head, packed=True)
