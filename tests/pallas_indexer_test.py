"""The indexer's kernels, interpreted, against XLA's code."""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.model.rope import rotate, turn
from ds4jax.pallas import indexer as pallas
from ds4jax.pallas.rope import spread

ROWS, HEADS, SIZE, RATIO = 8, 16, 64, 4
FREQUENCIES = np.asarray([1, 0.5, 0.1, 0.02], np.float32)
NEAR = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of scores near 10, summed in another order; of bfloat16, angles that differ in their
last bit round some of 1024 factors otherwise."""
same = np.testing.assert_array_equal


@functools.partial(jax.jit, static_argnames=("most", "dtype", "width"))
def best(query, share, keys, start, end, most, dtype="float32", width=None):
    place = jnp.asarray([start], jnp.int32), jnp.asarray([end], jnp.int32)
    turned = turn(start + jnp.arange(ROWS), spread(FREQUENCIES, SIZE))
    return pallas.best(
        query, share, keys, *place, turned, RATIO, most, dtype, width, interpret=True
    )


def selecting(scores):
    """Return query, share and keys whose scores are `scores / 32`, all exact.

    One head sees the positive part of a channel that is not rotated, one the negative.
    """
    sign = jnp.zeros(HEADS).at[:2].set(jnp.asarray([1, -1]))
    query = jnp.zeros((ROWS, HEADS, SIZE)).at[:, :, 0].set(sign)
    keys = jnp.zeros((len(scores), SIZE)).at[:, 0].set(scores)
    return query, jnp.broadcast_to(sign, (ROWS, HEADS)), keys


def assert_best(found, scores, start, end, most):
    for row in range(end - start):
        count = (start + row + 1) // RATIO
        if count > most:
            same(found[row], jax.lax.top_k(jnp.asarray(scores[:count]), most)[1])
        else:
            same(found[row], np.arange(most))


def scores_of(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    scores = rng.normal(size=count).astype(np.float32)
    if kind == "ties":
        return np.round(scores) + 0.0
    if kind == "rising":
        return np.sort(scores)
    if kind.endswith("lists"):
        # All the best are dealt to a few lists, which are then compared to their ends.
        scores[np.arange(count) % int(kind.split()[0]) < 3] += 10
    return scores


@pytest.mark.parametrize("kind", ["normal", "ties", "rising", "256 lists", "163 lists"])
def test_the_best_are_those_of_a_sort(kind):
    """In its order too.  Counts on both sides of `most` and of a list's doubling.

    1,024 keys are dealt to 256 lists, 2,599 to 163.
    """
    size, most = 2600, 64
    scores = scores_of(kind, size)
    for start in (0, RATIO * most - 4, RATIO * 256 - 5, RATIO * 1024 - 4, RATIO * 2599):
        end = start + ROWS if start < RATIO * 2599 else start + 3
        found = best(*selecting(scores), start, end, most)
        assert_best(found, scores, start, end, most)


@pytest.mark.parametrize("size, most", [(40, 32), (700, 512)])
def test_caches_and_choices_of_any_size(size, most):
    scores = scores_of("normal", size)
    for start in (RATIO * (most - 2), RATIO * size - ROWS):
        found = best(*selecting(scores), start, start + ROWS, most)
        assert_best(found, scores, start, start + ROWS, most)


@pytest.mark.parametrize("dtype", NEAR)
def test_scores_are_those_of_rotated_queries(dtype):
    """What is chosen scores as the best do, whatever is in keys that do not exist."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, share, keys = draw(ROWS, HEADS, SIZE), draw(ROWS, HEADS), draw(600, SIZE)
    start, most = RATIO * 500 - 3, 64
    keys = keys.at[(start + ROWS) // RATIO :].set(jnp.nan)
    positions = start + jnp.arange(ROWS)
    rounded = lambda a: a.astype(dtype).astype(jnp.float32)  # noqa: E731
    turned = rounded(rotate(query, positions[:, None], FREQUENCIES))
    match = jnp.einsum("tij,cj->tic", turned, rounded(keys))
    score = jnp.einsum("ti,tic->tc", share, jax.nn.relu(match)) / 32
    whole = best(query, share, keys, start, start + ROWS, most, dtype)
    for row, (found, expected) in enumerate(zip(whole, score, strict=True)):
        assert len(set(found.tolist())) == most
        expected = expected[: (start + row + 1) // RATIO]
        highest = jax.lax.top_k(expected, most)[0]
        np.testing.assert_allclose(expected[found], highest, rtol=0, atol=NEAR[dtype])
    for width in (1, 3) if dtype == "bfloat16" else ():
        spoilt = query.at[width:].set(jnp.nan), share.at[width:].set(jnp.nan)
        found = best(*spoilt, keys, start, start + width, most, dtype, width)
        same(found[:width], whole[:width])
        same(found[width:], np.repeat(whole[width - 1][None], ROWS - width, 0))


@pytest.mark.parametrize("size", [24, 16384])
def test_it_lowers_at_the_shapes_of_flash(size):
    place, query = jnp.zeros(1, jnp.int32), jnp.zeros((ROWS, 64, 128))
    assert pallas.serves(query)

    def run(query, share, keys):
        turned, most = (query[:, 0], query[:, 1]), min(size, 512)
        return pallas.best(
            query, share, keys, place, place, turned, RATIO, most, "bfloat16", 2
        )

    keys = jnp.zeros((size, 128))
    assert "index_best" in hopper.lowered(run, query, query[..., 0], keys)
