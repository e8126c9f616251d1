"""The compressors' kernel, interpreted, against XLA's code."""

import functools
from unittest import mock

import hopper
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax.model import cache as caches
from ds4jax.model.cache import DECODE_ROWS, Rows
from ds4jax.model.compressor import Compressor
from ds4jax.model.rope import frequencies
from ds4jax.pallas import compressor as pallas

NEAR = 1e-5
"""Softmax and norm of at most 32 inputs, summed in another order; values are near 1."""
CONFIG = models.micro_config(compress_ratios=(0, 4, 32))
HIDDEN, WIDTH = CONFIG.hidden, CONFIG.head_dim
RATIOS = pytest.mark.parametrize("ratio", [4, 32])
same = np.testing.assert_array_equal


def few_bits(x: jax.Array) -> jax.Array:
    """Return `x` so that sums of products are exact, whatever their order is."""
    return jnp.round(8 * x) / 8


def module(ratio: int) -> Compressor:
    channels = WIDTH * (2 if ratio == 4 else 1)
    rng = np.random.default_rng(ratio)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    weights = {"ape": draw(ratio, channels).astype(jnp.float16), "norm": draw(WIDTH)}
    weights |= {name: few_bits(draw(channels, HIDDEN)) / 8 for name in ("kv", "gate")}
    named = {f"{name}.weight": w for name, w in weights.items()}
    return Compressor(CONFIG, ratio, WIDTH, named)


def empty(ratio: int) -> caches.CompressorCache:
    cache = caches.empty(CONFIG, 96, slack=DECODE_ROWS, ratios=(ratio,))
    state = cache.layers[0].compressor
    assert state
    return state


def rows_of(start: int, count: int) -> Rows:
    offset = jnp.minimum(jnp.arange(DECODE_ROWS), count - 1)
    place = jnp.asarray([start], jnp.int32)
    return Rows(place, jnp.asarray([count], jnp.int32), start + offset[None], True)


@functools.cache
def runner(ratio: int):
    """Return functions of (x, state, start, count): XLA's pass and the kernel's."""
    compressor = module(ratio)

    @jax.jit
    def expected(x, state, start, count):
        return compressor(x[None], state, rows_of(start, count), lambda row: row)[1]

    @jax.jit
    def found(x, state, start, count):
        rows = rows_of(start, count)
        # A long window's row is of four programs.
        with mock.patch.object(pallas, "_CHANNELS", WIDTH // 4):
            inputs, kept = pallas.compress(
                compressor.kv(x), compressor.gate(x), rows.start, rows.end,
                state.inputs[0], state.rows[0], jnp.asarray(compressor.ape.get_value()),
                compressor.norm.weight.get_value(),
                frequencies(CONFIG, compressed=True), CONFIG.rms_eps, interpret=True,
            )  # fmt: skip
        return caches.CompressorCache(inputs[None], kept[None])

    return expected, found


def read(step, state, x, widths):
    """Return the state after a text read in passes of `widths`."""
    start = 0
    for width in widths:
        part = x[start : start + width]
        part = jnp.pad(part, ((0, DECODE_ROWS - width), (0, 0)), mode="edge")
        state = step(part, state, start, width)
        start += width
    return state


@RATIOS
def test_a_text_leaves_the_state_that_xla_leaves(ratio):
    """The ring wraps; windows lie in one pass, in two, and in the ring alone."""
    expected, found = runner(ratio)
    x = np.random.default_rng(0).normal(size=(90, HIDDEN))
    x = few_bits(jnp.asarray(x, jnp.float32))
    widths = [1, 8, 3, 5, 8, 2, 7, 8, 8, 4, 6, 1, 1, 1, 1, 8, 8, 8, 2]
    wanted = read(expected, empty(ratio), x, widths)
    state = read(found, empty(ratio), x, widths)
    same(state.inputs, wanted.inputs)
    np.testing.assert_allclose(state.rows, wanted.rows, rtol=NEAR, atol=NEAR)
    same(state.rows[0, 90 // ratio :], 0)
    assert np.all(np.any(np.asarray(state.rows[0, : 90 // ratio]) != 0, -1))


@RATIOS
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_the_state_has_the_bits_of_one_row_at_a_time(ratio, width):
    _, found = runner(ratio)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(48, HIDDEN)), jnp.float32)
    spoilt = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), empty(ratio))
    wanted = read(found, empty(ratio), x, [1] * 48)
    state = read(found, spoilt, x, [width] * (48 // width))
    live = 48 // ratio
    same(state.rows[:, :live], wanted.rows[:, :live])
    assert np.all(np.isnan(state.rows[:, live:]))
    same(state.inputs[:, :40], wanted.inputs[:, :40])


def test_what_it_serves():
    """Not a ring that a pass could overwrite while it is read."""
    ring, new = jnp.zeros((16, 2, 256)), jnp.zeros((DECODE_ROWS, 256))
    assert pallas.serves(new, ring, 4, 128)
    assert not pallas.serves(new, ring[1:], 4, 128)
    assert not pallas.serves(new[:, :192], ring[..., :192], 4, 96)
    assert not pallas.serves(new[:, :128], ring[..., :128], 4, 64)


@pytest.mark.parametrize("ratio, channels", [(4, 1024), (4, 256), (128, 512)])
def test_it_lowers_at_the_shapes_of_flash(ratio, channels):
    width = channels // 2 if ratio == 4 else channels
    place, new = jnp.zeros(1, jnp.int32), jnp.zeros((DECODE_ROWS, channels))
    ring = jnp.zeros((ratio * (channels // width) + 32, 2, channels))
    assert pallas.serves(new, ring, ratio, width)

    def run(new, ring, rows):
        return pallas.compress(
            new, new, place, place, ring, rows, jnp.zeros((ratio, channels)),
            jnp.zeros(width), frequencies(CONFIG, compressed=True), 1e-6,
        )  # fmt: skip

    assert "compress" in hopper.lowered(run, new, ring, jnp.zeros((512, width)))
