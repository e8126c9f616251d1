"""How large the inputs of a model's matrices are, measured on sequences of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax import schema
from ds4jax.imatrix import Sums
from ds4jax.model import cache
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.model.deepseek import Model
from ds4jax.pallas.passes import Report, Weight, watching


def collect(
    model: Model, chunks: Iterable[Sequence[int]], width: int
) -> dict[str, Sums]:
    """Run sequences through the model and sum the squared inputs of its matrices.

    Args:
      model: the model, with or without a head.
      chunks: token ids; each sequence starts anew.
      width: the most tokens of a sequence.

    Returns:
      By weight, in numpy and float64.
    """
    filled = -(-width // DECODE_ROWS) * DECODE_ROWS
    totals = jax.tree.map(lambda x: np.zeros(x.shape), _nothing(model))
    for chunk in chunks:
        text = np.zeros(filled + 1, np.int32)
        text[: len(chunk)] = chunk
        found = _sum_chunk(model, text, np.int32(len(chunk)))
        totals = jax.tree.map(lambda total, x: total + np.asarray(x), totals, found)
    return totals


def _nothing(model: Model) -> dict[str, Sums]:
    """Return the sums of no rows, for each weight that a plan may quantise."""
    specs = schema.trunk(model.config)
    if model.mtp:
        specs |= schema.mtp(model.config)
    return {
        name: Sums(
            jnp.zeros((*(spec.shape[:-2] or (1,)), spec.shape[-1])),
            jnp.zeros(spec.shape[:-2] or (1,)),
        )
        for name, spec in specs.items()
        if spec.group in ("dense", "experts", "down")
    }


@jax.jit
def _sum_chunk(
    model: Model, text: Int[Array, "N"], total: Int[Array, ""]
) -> dict[str, Sums]:
    """Return the float32 sums of one sequence.

    Args:
      model: the model.
      text: the ids, of which the first `total` are real; N - 1 is a multiple of 8.
      total: how many.
    """
    modules = model.modules()
    width = len(text) - 1
    chunk, following = (x.reshape(-1, 1, DECODE_ROWS) for x in (text[:-1], text[1:]))

    def step(carry, here):
        at, tokens, joined = here
        trunk, head, sums = carry
        sums = dict(sums)
        rows = lambda n: jnp.clip(n - at, 0, DECODE_ROWS)[None]  # noqa: E731
        with watching(_adding(sums, model, rows(total))):
            out = modules.trunk(tokens, trunk, rows(total))
        if modules.mtp:
            with watching(_adding(sums, model, rows(total - 1))):
                args = joined, out.streams, head, rows(total - 1)
                head = modules.mtp(modules.trunk, *args).cache
        return (out.cache, head, sums), None

    caches = (
        cache.empty(model.config, width),
        cache.empty(model.config, width, ratios=(0,)) if modules.mtp else None,
    )
    passes = jnp.arange(0, width, DECODE_ROWS), chunk, following
    (_, _, sums), _ = jax.lax.scan(step, (*caches, _nothing(model)), passes)
    return sums


def _adding(sums: dict[str, Sums], model: Model, count: Int[Array, "1"]) -> Report:
    """Return what adds the first `count` rows of a decode pass to `sums`."""
    plane = lambda weight: id(jax.tree.leaves(weight)[0])  # noqa: E731
    names = {plane((model.trunk | model.mtp)[name]): name for name in sums}
    real = jnp.arange(DECODE_ROWS) < count

    def add(x: Float[Array, "..."], weight: Weight, expert_ids: Array | None):
        name = names.get(plane(weight))
        if name is None:
            return
        squares, counts = map(jnp.asarray, sums[name])
        x = x.reshape(DECODE_ROWS, -1, x.shape[-1])
        inputs = x.shape[1]
        matrix = jnp.zeros((DECODE_ROWS, inputs), jnp.int32)
        if expert_ids is not None:
            matrix = expert_ids
        # A matrix that does not exist takes the rows that fill a pass up.
        matrix = jnp.where(real[:, None], matrix, len(counts)).reshape(-1)
        sums[name] = Sums(
            squares.at[matrix].add(jnp.square(x).reshape(len(matrix), -1), mode="drop"),
            counts.at[matrix].add(1, mode="drop"),
        )

    return add
