"""The kernels of attention in decode passes, interpreted, against XLA's code."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from pallas_kernels_test import DTYPES, ROWS, normal, read, same

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


@pytest.mark.parametrize("window, used", [(48, 32), (480, 96)])
@DTYPES
def test_attention(turned, window, used, dtype):
    """Rows that all queries see and rows that each chose, parts of them invisible.

    In parts of 32 rows and, where those would be many, of 64; the last of the window's
    is half a part.
    """
    positions, table, there = turned
    query, sinks = normal(0, ROWS, 16, 64), normal(1, 16)
    draw = np.random.default_rng(2)
    seen, picked = draw.random((ROWS, window)) < 0.4, draw.random((ROWS, used)) < 0.4
    seen[1, 32:] = picked[1, 32:] = picked[2] = False
    raw, compressed = normal(3, window, 64), normal(4, 96, 64)
    index = jnp.asarray(draw.integers(48, size=(ROWS, used)))
    # Only what nobody may see.
    raw = raw.at[7].set(jnp.nan)
    seen[:, 7] = False
    compressed = compressed.at[48:].set(jnp.nan)
    index = jnp.where(picked, index, 50)
    sources = [(raw, jnp.asarray(seen), None)]
    sources += [(compressed, jnp.asarray(picked), index)]
    assert attention.serves(16, 64, 32, [window, used])

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
    # Products of 64 rows are the CPU's own here: it takes them as the program suits it.
    for width in (1, 2, 5) if window == 48 else ():
        found = run(query.at[width:].set(jnp.nan), width)
        same(found[:width], whole[:width])
