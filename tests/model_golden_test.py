"""The model computes what transformers does, in one pass or in any pieces.

`ATOL` is what the float32 of two frameworks may differ by after six layers: logits are
of deviation 1, streams reach 10, and both agree to about 8e-6.  A wrong formula is off
by 1e-2 or more.
"""

import functools

import golden
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.model.cache import DECODE_ROWS
from ds4jax.model.deepseek import build
from ds4jax.model.mtp import pair

ATOL = 2e-5
CONFIG, _TRUNK, _MTP, OUT = golden.load()
TOKENS = OUT["tokens"]
BATCH, LENGTH = TOKENS.shape


@functools.cache
def model():
    return build(CONFIG, _TRUNK, _MTP)


@functools.cache
def forward():
    return models.trunk(model(), TOKENS)


def close(actual, expected, what=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL, err_msg=what)


def same_sets(actual, expected, what=""):
    np.testing.assert_array_equal(np.sort(actual), np.sort(expected), what)


def advance(cache, start: int, count: int):
    """Run `count` tokens, in a prefill pass or a decode pass filled up with token 0."""
    width = DECODE_ROWS if count <= DECODE_ROWS else LENGTH
    tokens = np.zeros((BATCH, width), np.int32)
    tokens[:, :count] = TOKENS[:, start : start + count]
    return models.trunk(model(), tokens, cache, np.full(BATCH, count, np.int32))


def test_logits_of_one_pass_without_a_cache():
    close(forward().logits, OUT["logits"])


def test_streams_after_every_layer():
    streams = forward().trace.streams
    assert len(streams) == len(OUT["streams"]) == CONFIG.layers + 1
    for layer, found in enumerate(streams):
        close(found, OUT["streams"][layer], f"before layer {layer}")
    np.testing.assert_array_equal(forward().streams, streams[-1])


def test_every_router_chooses_the_same_experts():
    assert len(forward().trace.experts) == len(OUT["router"])
    for layer, found in enumerate(forward().trace.experts):
        same_sets(found, OUT["router"][layer], f"layer {layer}")


def test_every_indexer_chooses_the_same_rows():
    found = [chosen for chosen in forward().trace.selected if chosen is not None]
    assert len(found) == len(OUT["indexer"]) == 2
    for number, chosen in enumerate(found):
        same_sets(chosen, OUT["indexer"][number], f"CSA layer {number}")


def test_one_prefill_pass():
    cache = models.fresh(CONFIG, LENGTH, BATCH)
    found = advance(cache, 0, LENGTH)
    close(found.logits, OUT["logits"])
    close(found.logits, forward().logits)
    np.testing.assert_array_equal(found.cache.length, [LENGTH] * BATCH)


def test_one_token_at_a_time():
    cache = models.fresh(CONFIG, LENGTH, BATCH)
    logits, streams, experts, selected = [], [], [], []
    for t in range(LENGTH):
        found = models.trunk(model(), TOKENS[:, t : t + 1], cache)
        cache = found.cache
        logits.append(found.logits)
        streams.append(found.streams)
        experts.append(found.trace.experts)
        selected.append([s for s in found.trace.selected if s is not None])
    logits = np.concatenate(logits, 1)
    close(logits, OUT["logits"])
    close(logits, OUT["decode_logits"])
    close(logits, forward().logits)
    close(np.concatenate(streams, 1), OUT["streams"][-1])
    same_sets(np.concatenate(experts, axis=2), OUT["router"])
    same_sets(np.concatenate(selected, axis=2), OUT["indexer"])


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_split_into_passes(data):
    cache, start = models.fresh(CONFIG, LENGTH, BATCH), 0
    while start < LENGTH:
        # Half of the pieces are decode passes, or hypothesis would draw few of them.
        longest = min(data.draw(st.sampled_from([DECODE_ROWS, LENGTH])), LENGTH - start)
        count = data.draw(st.integers(1, longest))
        found = advance(cache, start, count)
        piece = slice(start, start + count)
        close(found.logits[:, :count], OUT["logits"][:, piece])
        close(found.streams[:, :count], OUT["streams"][-1][:, piece])
        cache, start = found.cache, start + count


@pytest.mark.parametrize("pairing", ["trained", "ds4"])
def test_mtp_block(pairing):
    name = {"trained": "mtp", "ds4": "mtp_ds4"}[pairing]
    streams, tokens = pair(forward().streams, jnp.asarray(TOKENS), pairing)
    found = models.mtp(model(), tokens, streams)
    close(found.logits, OUT[f"{name}_logits"])
    close(found.streams, OUT[f"{name}_streams"])


def test_mtp_block_one_pair_at_a_time():
    cache = models.fresh(CONFIG, LENGTH, BATCH, mtp=True)
    for t in range(LENGTH - 1):
        found = models.mtp(
            model(), TOKENS[:, t + 1 : t + 2], forward().streams[:, t : t + 1], cache
        )
        cache = found.cache
        close(found.logits[:, 0], OUT["mtp_logits"][:, t], f"pair {t}")
