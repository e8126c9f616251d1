"""What all maps of attention's input make of it, and of the streams that give it.

A GPU has them all in one launch, which reads the hyper connection's streams too.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from ds4jax.model import indexer
from ds4jax.model.compressor import Compressor
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import Linear, RMSNorm, project, project_normed
from ds4jax.pallas import attn_maps
from ds4jax.pallas.fixed_point import FixedPoint
from ds4jax.pallas.passes import by_kernel, has_kernels


class InputMaps(NamedTuple):
    """What attention's input goes through, in a layer of any kind.

    Attributes:
      q_a, q_norm, q_b: the queries' two maps and the norm of the latent between them.
      kv: the row's to keep.
      compressor: in layers that have one.
      indexer: in CSA layers.
    """

    q_a: Linear
    q_norm: RMSNorm
    q_b: Linear
    kv: Linear
    compressor: Compressor | None
    indexer: Indexer | None


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
    maps: InputMaps,
    x: Float[Array, "B T D"],
    fixed: FixedPoint | None = None,
) -> Projected:
    """Return what a layer's maps make of its input.

    Args:
      maps: the layer's.
      x: normed hidden rows.
      fixed: `x` as kernels read it, if something computed that already.
    """
    latent, row = project(x, maps.q_a, maps.kv, fixed=fixed)
    query = project_normed(latent, maps.q_norm, maps.q_b)
    pooled = maps.compressor.project(x) if maps.compressor else None
    if not maps.indexer:
        return Projected(row, query, pooled, None)
    return Projected(row, query, pooled, maps.indexer.project(x, maps.q_norm(latent)))


def project_streams(
    maps: InputMaps,
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
      maps: the layer's.
      connection: reads the block's input.
      norm: the block's own.
      streams: the residual streams.
      update: what is to be merged into them first, if anything.
    """

    def apart(streams, update):
        x, fixed, streams, post, mix = connection(streams, update, norm)
        return project_input(maps, x, *fixed), streams, post, mix

    if not has_kernels():
        return apart(streams, update)
    weights = _weights(maps)
    programs = attn_maps.programs(connection.reading(streams, update, norm), weights)

    def together(width, streams, update):
        reading = connection.reading(streams, update, norm)
        products, *others = attn_maps.multiply(reading, weights, width, programs)
        found = _sorted(maps, [product[None] for product in products])
        return found, *(result[None] for result in others)

    cuda = together if programs else None
    return by_kernel(apart, streams, update, cuda=cuda)


def _weights(maps: InputMaps) -> attn_maps.Maps:
    """Return the weights of all maps."""
    first, second = [maps.q_a, maps.kv], [maps.q_b]
    if maps.compressor:
        first += [maps.compressor.kv, maps.compressor.gate]
    if own := maps.indexer:
        first += [own.compressor.kv, own.compressor.gate, own.head_weights]
        second += [own.query]
    values = lambda maps: [m.weight.get_value() for m in maps]  # noqa: E731
    norm = maps.q_norm.weight.get_value(), maps.q_norm.eps
    return attn_maps.Maps(values(first), norm, values(second))


def _sorted(maps: InputMaps, products: list[Array]) -> Projected:
    """Return what weights of `_weights`, in their order, make of the input."""
    if not maps.compressor:
        _, row, query = products
        return Projected(row, query, None, None)
    if not maps.indexer:
        _, row, value, gate, query = products
        return Projected(row, query, (value, gate), None)
    _, row, value, gate, own_value, own_gate, share, query, own = products
    indexed = indexer.Projected(own_value, own_gate, share, own)
    return Projected(row, query, (value, gate), indexed)
