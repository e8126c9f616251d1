"""The row contract: a row's bits depend on its own history alone.

Not on how many rows a pass has, what the others hold, at which index it stands, how
many sequences there are, or what the caller does with the results.  Everything here is
compared bit for bit: logits, streams, every slot of every cache, and the MTP head.
Sinkhorn runs 3 iterations instead of 20 to compile sooner; it is elementwise over rows.
"""

import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from models import assert_same, assert_same_state, fresh, lively, mtp, text, trunk

from ds4jax.config import ModelConfig
from ds4jax.model.cache import DECODE_ROWS

pytestmark = pytest.mark.optimised
CONFIGS = {
    "micro": models.micro_config(),
    "tiny": ModelConfig.tiny(
        layers=3,
        compress_ratios=(0, 4, 128),
        hash_layers=1,
        sinkhorn_iters=3,
        vocab=512,
        expert_ffn=128,
    ),  # fmt: skip
    "micro with ds4's rounding": models.micro_config(
        head_dim=80, index_dim=32, kv_rounding="ds4"
    ),
}
BEFORE, AFTER = 45, DECODE_ROWS
"""Committed tokens, and tokens to decode: windows of 4 and 16 end among these."""


@functools.cache
def prompt(name: str, batch: int = 1):
    """Return (model, following tokens, trunk cache, MTP cache) after a text.

    Each sequence is read by itself and a row at a time, with the programs of `alone`:
    those of longer passes would be compiled for nothing else.
    """
    config = CONFIGS[name]
    model, tokens = lively(config), text(config, BEFORE + AFTER + 1, batch)
    states = []
    for i in range(batch):
        cache, mtp_cache = fresh(config), fresh(config, mtp=True)
        for row in range(BEFORE):
            outs = decode(model, tokens[i : i + 1, row:], cache, mtp_cache, 1)
            cache, mtp_cache = (out.cache for out in outs)
        states.append((cache, mtp_cache))
    cache, mtp_cache = jax.tree.map(lambda *parts: np.concatenate(parts), *states)
    return model, tokens[:, BEFORE:], cache, mtp_cache


def decode(model, tokens, cache, mtp_cache, width, count=None):
    """Return one pass of the first `width` tokens through the trunk and the head."""
    count = np.full(len(tokens), width, np.int32) if count is None else count
    found = trunk(model, tokens[:, :width], cache, count)
    head = mtp(model, tokens[:, 1 : width + 1], found.streams, mtp_cache, count)
    return found, head


@functools.cache
def alone(name: str):
    """Return the results of decoding one row at a time, and each state on the way."""
    model, tokens, cache, mtp_cache = prompt(name)
    steps = []
    for row in range(AFTER):
        steps.append(decode(model, tokens[:, row:], cache, mtp_cache, 1))
        cache, mtp_cache = (out.cache for out in steps[-1])
    return steps


def rows_of(out):
    """Return what a pass says of its rows, in a pytree of [B, T, ...]."""
    return out.replace(cache=None)


def joined(steps):
    return [
        jax.tree.map(lambda *rows: np.concatenate(rows, 1), *map(rows_of, outs))
        for outs in zip(*steps, strict=True)
    ]


# Of the module, so that all tests of a model follow each other: they share programs.
every_model = pytest.mark.parametrize("name", CONFIGS, scope="module")
WIDTHS = {
    "micro": range(2, 9),
    "tiny": (2, 3, 4, 8),
    "micro with ds4's rounding": (2, 8),
}


@every_model
def test_any_width_gives_the_bits_of_one_row_at_a_time(name):
    for width in WIDTHS[name]:
        found, one_by_one = decode(*prompt(name), width), alone(name)[:width]
        rows = [rows_of(out) for out in found]
        assert_same(rows, joined(one_by_one), what=f"of {width} rows ")
        states = [out.cache for out in found]
        assert_same(
            states, [o.cache for o in one_by_one[-1]], what=f"after {width} rows "
        )


@every_model
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_padding_leaves_no_trace(name, count):
    """Rows beyond `count` hold other tokens; the state is as if they were not there."""
    model, tokens, cache, mtp_cache = prompt(name)
    padded = tokens.copy()
    padded[:, count + 1 :] = (tokens[:, count + 1 :] + 7) % CONFIGS[name].vocab
    found = decode(model, padded, cache, mtp_cache, 8, np.array([count], np.int32))
    states = [out.cache for out in found]
    if count == 0:
        assert_same(states, [cache, mtp_cache])
        return
    real = [jax.tree.map(lambda x: x[:, :count], rows_of(out)) for out in found]
    assert_same(real, joined(alone(name)[:count]))
    assert_same(states, [out.cache for out in alone(name)[count - 1]])


@every_model
def test_later_rows_do_not_change_earlier_ones(name):
    model, tokens, cache, mtp_cache = prompt(name)
    for row in range(1, 8):
        changed = tokens.copy()
        changed[:, row + 1 :] = (tokens[:, row + 1 :] + 11) % CONFIGS[name].vocab
        found = decode(model, changed, cache, mtp_cache, 8)
        before = [
            jax.tree.map(lambda x, n=row: x[:, :n], rows_of(out)) for out in found
        ]
        assert_same(before, joined(alone(name)[:row]))
        # What a rejected draft leaves behind is beyond `length`.
        for out, step in zip(found, alone(name)[row - 1], strict=True):
            back = out.cache.replace(length=out.cache.length - (8 - row))
            assert_same_state(back, step.cache, CONFIGS[name])


@pytest.mark.parametrize("name", ["micro", "tiny"], scope="module")
def test_sequences_of_different_lengths_do_not_touch_each_other(name):
    """Three sequences in one pass have the bits of three passes."""
    width = 3
    model, tokens, cache, mtp_cache = prompt(name, batch=3)
    back = np.array([0, 2, 9], np.int32)
    cache, mtp_cache = (c.replace(length=c.length - back) for c in (cache, mtp_cache))
    counts = np.array([width, 1, 0], np.int32)
    together = decode(model, tokens, cache, mtp_cache, width, counts)
    for i in range(3):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i : i + 1], tree)  # noqa: E731
        one = decode(
            model, tokens[i : i + 1], pick(cache), pick(mtp_cache), width, pick(counts)
        )
        assert_same(pick(together), one)
    assert len(set(np.asarray(together[0].cache.length))) == 3


@pytest.mark.parametrize("name", ["micro"], scope="module")
def test_a_loop_on_the_device_gives_the_bits_of_single_passes(name):
    """XLA compiles the pass into its surroundings; that must not choose its bits."""
    model, tokens, cache, mtp_cache = prompt(name)

    @jax.jit
    def loop(model, cache, mtp_cache, first):
        def cycle(state, _):
            cache, mtp_cache, token = state
            modules = model.modules()
            out = modules.trunk(token, cache)
            best = jnp.argmax(out.logits, -1).astype(jnp.int32)
            head = modules.mtp(modules.trunk, best, out.streams, mtp_cache)
            return (out.cache, head.cache, best), (best, jnp.max(head.logits, -1))

        return jax.lax.scan(cycle, (cache, mtp_cache, first), length=6)

    state, (chosen, peaks) = loop(model, cache, mtp_cache, tokens[:, :1])
    token, found_chosen, found_peaks = tokens[:, :1], [], []
    for _ in range(6):
        out = trunk(model, token, cache)
        token = np.argmax(out.logits, -1).astype(np.int32)
        head = mtp(model, token, out.streams, mtp_cache)
        cache, mtp_cache = out.cache, head.cache
        found_chosen.append(token)
        found_peaks.append(np.max(head.logits, -1))
    np.testing.assert_array_equal(chosen, np.stack(found_chosen))
    np.testing.assert_array_equal(peaks, np.stack(found_peaks))
    assert_same(state, (cache, mtp_cache, token))


@pytest.mark.parametrize("width", [5, 24])
def test_logits_of_the_last_real_row_alone(width):
    """Of a decode pass the bits are the same, whatever else it is asked for.

    Seen red with the first row, and in the long pass with the last, real or not.
    """
    config = models.slim_config()
    model, tokens, count = lively(config), text(config, width, batch=2), [3, width]
    run = functools.partial(
        jax.jit(lambda *args, last: model.modules().trunk(*args, last=last),
                static_argnames="last"),
        tokens, fresh(config, batch=2), jnp.asarray(count, jnp.int32),
    )  # fmt: skip
    every, one = run(last=False), run(last=True)
    expected = every.logits[jnp.arange(2), jnp.asarray(count) - 1]
    assert one.logits.shape == (2, 1, config.vocab)
    if width <= DECODE_ROWS:
        np.testing.assert_array_equal(one.logits[:, 0], expected)
        assert_same_state(one.cache, every.cache, config)
    # One row of a product may be summed in another order than many.
    np.testing.assert_allclose(one.logits[:, 0], expected, rtol=1e-4, atol=1e-5)
