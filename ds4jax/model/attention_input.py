"""What all maps of attention's input make of it, and of the streams that give it.

A GPU has them all in one launch, which reads the hyper connection's streams too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Array, Float

from ds4jax.config import CSA_RATIO
from ds4jax.model import indexer
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import RMSNorm, project, project_normed
from ds4jax.pallas import attn_maps
from ds4jax.pallas.fixed_point import FixedPoint
from ds4jax.pallas.passes import by_kernel, has_kernels

if TYPE_CHECKING:
    from ds4jax.model.attention import Attention


class Projected(NamedTuple):
    """What attention takes in.

    Attributes:
      row: the row to keep, neither normed nor rotated yet.
      query: all heads' queries, neither normed nor rotated yet.
      compressor: what a compressor takes in, in layers that have one.
      indexer: what the indexer takes in, in CSA layers.
    """

    row: Float[Array, "B T K"]
    query: Float[Array, "B T _"]
    compressor: tuple[Float[Array, "B T V"], Float[Array, "B T V"]] | None
    indexer: indexer.Projected | None


def project_input(
    attention: Attention,
    x: Float[Array, "B T D"],
    fixed: FixedPoint | None = None,
) -> Projected:
    """Return what a layer's maps make of its input.

    Args:
      attention: the layer's.
      x: normed hidden rows.
      fixed: `x` as kernels read it, if something computed that already.
    """
    own = attention
    latent, row = project(x, own.q_a, own.kv, fixed=fixed)
    query = project_normed(latent, own.q_norm, own.q_b)
    pooled = own.compressor.project(x) if own.ratio else None
    if own.ratio != CSA_RATIO:
        return Projected(row, query, pooled, None)
    return Projected(row, query, pooled, own.indexer.project(x, own.q_norm(latent)))


def project_streams(
    attention: Attention,
    connection: HyperConnection,
    norm: RMSNorm,
    streams: Float[Array, "B T M D"],
    update: Update | None,
) -> tuple[
    Projected,
    Float[Array, "B T M D"],
    Float[Array, "B T M"],
    Float[Array, "B T M M"],
]:
    """Return what `connection` and then `project_input` do.

    That is, after the latter's result, the streams, and `post` and `mix` of the block.

    Args:
      attention: the layer's.
      connection: reads the block's input.
      norm: the block's own.
      streams: the residual streams.
      update: what is to be merged into them first, if anything.
    """

    def apart(streams, update):
        x, fixed, streams, post, mix = connection(streams, update, norm)
        return project_input(attention, x, *fixed), streams, post, mix

    if not has_kernels():
        return apart(streams, update)
    maps = _maps(attention)
    programs = attn_maps.programs(connection.reading(streams, update, norm), maps)

    def together(width, streams, update):
        reading = connection.reading(streams, update, norm)
        products, *others = attn_maps.multiply(reading, maps, width, programs)
        found = _sorted(attention.ratio, [product[None] for product in products])
        return found, *(result[None] for result in others)

    cuda = together if programs else None
    return by_kernel(apart, streams, update, cuda=cuda)


def _maps(attention: Attention) -> attn_maps.Maps:
    """Return the weights of all maps."""
    first, second = [attention.q_a, attention.kv], [attention.q_b]
    if attention.ratio:
        first += [attention.compressor.kv, attention.compressor.gate]
    if attention.ratio == CSA_RATIO:
        own = attention.indexer
        first += [own.compressor.kv, own.compressor.gate, own.head_weights]
        second += [own.query]
    weights = lambda maps: [m.weight.get_value() for m in maps]  # noqa: E731
    norm = attention.q_norm.weight.get_value(), attention.q_norm.eps
    return attn_maps.Maps(weights(first), norm, weights(second))


def _sorted(ratio: int, products: list[Array]) -> Projected:
    """Return what the maps of `_maps`, in their order, make of the input."""
    if not ratio:
        _, row, query = products
        return Projected(row, query, None, None)
    if ratio != CSA_RATIO:
        _, row, value, gate, query = products
        return Projected(row, query, (value, gate), None)
    _, row, value, gate, own_value, own_gate, share, query, own = products
    indexed = indexer.Projected(own_value, own_gate, share, own)
    return Projected(row, query, (value, gate), indexed)
