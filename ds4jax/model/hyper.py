"""Manifold-constrained hyper connections: M residual streams instead of one.

Source: mHC as in DeepSeek-V4 (ARCHITECTURE §2); ds4 `hc_*` tensors.  Everything is
float32, whatever the operand type of the other products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ds4jax.config import ModelConfig
from ds4jax.model.layers import Linear, RMSNorm, Weights, rms
from ds4jax.pallas import hyper_connection, stream_maps
from ds4jax.pallas.fixed_point import FixedPoint, Order, blank
from ds4jax.pallas.hyper_connection import Reading
from ds4jax.pallas.passes import by_kernel, has_kernels, of_prefill
from ds4jax.quant import dequantize

ORDERS = (Order(),)
"""In which kernels read a block's input in fixed point."""


def sinkhorn(
    logits: Float[Array, "*rows M M"], iterations: int, eps: float
) -> Float[Array, "*rows M M"]:
    """Return a nearly doubly stochastic matrix from `logits`.

    One softmax over the last axis, then column and row normalisations in turn:
    `iterations` of columns, one fewer of rows, ending on columns.
    """
    mix = jax.nn.softmax(logits, axis=-1) + eps
    mix = mix / (jnp.sum(mix, axis=-2, keepdims=True) + eps)

    def rows_then_columns(mix, _):
        mix = mix / (jnp.sum(mix, axis=-1, keepdims=True) + eps)
        return mix / (jnp.sum(mix, axis=-2, keepdims=True) + eps), None

    # A loop: unrolled, it is half of all that XLA has to compile.
    return jax.lax.scan(rows_then_columns, mix, length=iterations - 1)[0]


def _maps(
    fn: Linear, streams: Float[Array, "B T M D"], eps: float
) -> Float[Array, "B T F"]:
    """Return the map `fn` of each row's normed streams."""
    flat = streams.reshape(*streams.shape[:-2], -1)

    def kernel(flat):
        weight = dequantize(fn.weight.get_value())
        return stream_maps.product(flat[0], weight, eps)[None]

    served = len(flat) == 1 and stream_maps.serves(flat[0])
    product = lambda flat: fn(rms(flat, eps))  # noqa: E731
    return of_prefill(product, flat, cuda=kernel if served else None)


class Update(NamedTuple):
    """A block's output, which is still to be merged into the streams.

    Attributes:
      parts: [B, T, D], whose sum is the output.
      post: [B, T, M], weights of the output in each stream.
      mix: [B, T, M, M], weights of the streams before.
    """

    parts: tuple[Float[Array, "B T D"], ...]
    post: Float[Array, "B T M"]
    mix: Float[Array, "B T M M"]

    def merged(self, streams: Float[Array, "B T M D"]) -> Float[Array, "B T M D"]:
        """Return `post_k output + sum_j mix[j, k] streams_j`: first index summed."""
        carried = jnp.sum(self.mix[..., None] * streams[..., :, None, :], axis=-3)
        output = functools.reduce(jnp.add, self.parts)
        return self.post[..., None] * output[..., None, :] + carried


class HyperConnection(nnx.Module):
    """Merges what a block before left and mixes the streams into the next one's input.

    The two are one step, for a GPU reads the streams once then.
    """

    def __init__(self, config: ModelConfig, weights: Weights):
        self.fn = Linear(weights["fn.weight"])
        self.base = nnx.Param(dequantize(weights["base.weight"]))
        self.scale = nnx.Param(dequantize(weights["scale.weight"]))
        self.config = config

    def __call__(
        self, streams: Float[Array, "B T M D"], update: Update | None, norm: RMSNorm
    ) -> tuple[
        Float[Array, "B T D"],
        tuple[FixedPoint, ...],
        Float[Array, "B T M D"],
        Float[Array, "B T M"],
        Float[Array, "B T M M"],
    ]:
        """Return the block's normed input, the streams, and `post` and `mix` of it.

        After the input comes what kernels read of it, in each of ORDERS, where there
        may be some, and else nothing.

        Args:
          streams: the residual streams.
          update: what is to be merged into them first, if anything.
          norm: the block's own.
        """
        if not (has_kernels() and hyper_connection.serves(streams)):
            x, streams, post, mix = self._read(streams, update, norm)
            return x, (), streams, post, mix

        def kernel(width, streams, update):
            of_row = self.reading(streams, update, norm)
            x, fixed, *others = hyper_connection.read(of_row, ORDERS, width)
            return x[None], fixed, *(result[None] for result in others)

        def read(streams, update):
            x, *others = self._read(streams, update, norm)
            _, rows, width = x.shape
            make = functools.partial(blank, rows, width, self.config.dtype)
            return x, tuple(map(make, ORDERS)), *others

        return by_kernel(read, streams, update, cuda=kernel)

    def reading(
        self, streams: Float[Array, "1 T M D"], update: Update | None, norm: RMSNorm
    ) -> Reading:
        """Return what kernels read in a decode pass; the arguments are a call's."""
        streams, update = jax.tree.map(lambda array: array[0], (streams, update))
        weights = self.fn.weight, self.base, self.scale, norm.weight
        fn, base, scale, of_norm = cast(list[Array], [w.get_value() for w in weights])
        return Reading(streams, update, fn, base, scale, of_norm, self.config)

    def _read(self, streams, update, norm):
        c, m = self.config, self.config.hc_streams
        streams = update.merged(streams) if update else streams
        base, scale = self.base.get_value(), self.scale.get_value()
        maps = _maps(self.fn, streams, c.rms_eps)
        pre = jax.nn.sigmoid(maps[..., :m] * scale[0] + base[:m]) + c.hc_eps
        post = 2 * jax.nn.sigmoid(maps[..., m : 2 * m] * scale[1] + base[m : 2 * m])
        logits = maps[..., 2 * m :] * scale[2] + base[2 * m :]
        logits = logits.reshape(*logits.shape[:-1], m, m)
        mix = self._sinkhorn(logits)
        x = norm(jnp.sum(pre[..., None] * streams, axis=-2))
        return x, streams, post, mix

    def _sinkhorn(self, logits):
        sizes = self.config.sinkhorn_iters, self.config.hc_eps

        def kernel(logits):
            return hyper_connection.sinkhorn(logits[0], *sizes)[None]

        served = len(logits) == 1 and hyper_connection.serves_sinkhorn(logits[0])
        run = lambda logits: sinkhorn(logits, *sizes)  # noqa: E731
        return of_prefill(run, logits, cuda=kernel if served else None)


class HyperHead(nnx.Module):
    """Reads one vector out of the streams: no Sinkhorn, no factor 2."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.fn = Linear(weights["fn.weight"])
        self.base = nnx.Param(dequantize(weights["base.weight"]))
        self.scale = nnx.Param(dequantize(weights["scale.weight"]))
        self.config = config

    def __call__(self, streams: Float[Array, "B T M D"]) -> Float[Array, "B T D"]:
        """Return the weighted sum of the streams, un-normed."""
        maps = _maps(self.fn, streams, self.config.rms_eps)
        maps = maps * self.scale.get_value() + self.base.get_value()
        share = jax.nn.sigmoid(maps) + self.config.hc_eps
        return jnp.sum(share[..., None] * streams, axis=-2)
