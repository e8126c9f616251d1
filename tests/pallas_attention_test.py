"""The kernels of attention in decode passes, interpreted, against XLA's code."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_kernels_test import DTYPES, ROWS, assert_copies, normal, read, same

from ds4jax.model.attention import Source, attend
from ds4jax.model.layers import rms
from ds4jax.model.rope import frequencies, rotate, turn
from ds4jax.pallas import attention

GROUPS = 2


EPS = 1e-6


@pytest.fixture(scope="module")
def turned():
    """Positions of ROWS rows, and the rotations of 32 channels there."""
    config = models.micro_config(rope_dim=32, index_dim=32)
    table = frequencies(config, compressed=False)
    positions = jnp.arange(ROWS)[None] * 37
    return positions, table, turn(positions[0], table)


def test_preparing_rows(turned):
    positions, table, there = turned
    row, norm = normal(1, ROWS, 64), normal(2, 64)

    def run(row, width):
        return attention.prepare_rows(row, norm, EPS, there, width, interpret=True)

    whole = run(row, None)
    expected = rotate(rms(row, EPS) * norm, positions[0], table)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
    for width in (1, 2, 5):
        assert_copies(run(row.at[width:].set(jnp.nan), width), whole, width)


@DTYPES
def test_attention(turned, dtype):
    """Rows that all queries see and rows that each chose, parts of them invisible."""
    positions, table, there = turned
    query, sinks = normal(0, ROWS, 16, 64), normal(1, 16)
    draw = np.random.default_rng(2)
    seen = draw.random((2, ROWS, 64)) < 0.4
    seen[:, 1, 32:] = False
    seen[1, 2] = False
    # The last of the first source's parts is half a part.
    raw, compressed = normal(3, 48, 64), normal(4, 96, 64)
    index = jnp.asarray(draw.integers(48, size=(ROWS, 32)))
    # Only what nobody may see.
    raw = raw.at[7].set(jnp.nan)
    seen[0, :, 7] = False
    compressed = compressed.at[48:].set(jnp.nan)
    index = jnp.where(seen[1, :, :32], index, 50)
    sources = [(raw, jnp.asarray(seen[0, :, :48]), None)]
    sources += [(compressed, jnp.asarray(seen[1, :, :32]), index)]
    assert attention.serves(16, 64, 32, [48, 32])

    def run(query, width):
        found = attention.attend(
            query, sources, sinks, there, EPS, dtype, GROUPS, width, interpret=True
        )
        value, _ = read(found)
        return value.reshape(ROWS, 16, 64)

    named = [Source(*jax.tree.map(lambda a: a[None], source)) for source in sources]
    ready = rotate(rms(query[None], EPS), positions[..., None], table)
    expected = attend(ready, [source.seen() for source in named], sinks, dtype)
    expected = rotate(expected, positions[..., None], table, inverse=True)
    whole = run(query, None)
    # Weights are rounded to bfloat16 before and after they are scaled by the peak.
    worst = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(whole, expected[0], rtol=worst, atol=worst)
    for width in (1, 2, 5):
        found = run(query.at[width:].set(jnp.nan), width)
        same(found[:width], whole[:width])
