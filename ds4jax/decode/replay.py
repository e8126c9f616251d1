"""A text decoded once more by the plainest way, and a carry compared with it.

The tokens of a run are fed again, one a pass, to the model's own modules, and each is
paired with the streams before it for one row of the MTP head.  Nothing here is shared
with the transitions and the cycles, so what they do wrong is not repeated.  By the row
contract all that an exact run leaves behind must have the replay's bits: the trunk's
rings and rows, the logits, the anchor and the head's rows.  And what every draft would
have been is known, so is which cycles there are and which drafts they accept: a wrong
anchor, which never costs a token, shows there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.decode import driver
from ds4jax.decode.carry import ANCHOR_ROWS, MAX_DEPTH, DecodeCarry
from ds4jax.decode.modes import Mode
from ds4jax.model.cache import Cache
from ds4jax.model.deepseek import Model


class Replay(NamedTuple):
    """What feeding n tokens after a prompt leaves behind.

    Attributes:
      tokens: the prompt's and the n after it.
      prompt_length: of the prompt.
      cache: the trunk's.
      head: the MTP head's, row i of (h_i, t_{i+1}), or None.
      logits: float32 [V], after the last token.
      streams: float32 [ANCHOR_ROWS, M, D], of the newest tokens, oldest first; zeros
        where those are older than the prompt's last.
      guesses: int32 [n, MAX_DEPTH]: the draft chain made when token i of the n is
        decided: guesses of the tokens i + 1 and on; zeros without a head.
      leads: float32 [n]: of the chain's first over the head's runner-up, in logits.
    """

    tokens: list[int]
    prompt_length: int
    cache: Cache
    head: Cache | None
    logits: np.ndarray
    streams: np.ndarray
    guesses: np.ndarray
    leads: np.ndarray


def replay(model: Model, prompt: DecodeCarry, after: Sequence[int]) -> Replay:
    """Feed tokens after a prompt, one a pass.

    Args:
      model: the model.
      prompt: B = 1, as prefilled under the warm policy; kept.
      after: n >= 1 tokens, for which there must be room.
    """
    text = np.zeros(prompt.max_context, np.int32)
    text[: len(after)] = after
    newest = None if prompt.anchor is None else prompt.anchor.streams[:, :1]
    state = _feed(
        model, prompt.cache, prompt.mtp_cache, newest, text, np.int32(len(after))
    )
    cache, head, logits, streams, guesses, leads = state
    read = driver.committed(prompt)
    return Replay(
        [*read, *after], len(read), cache, head, np.asarray(logits),
        np.asarray(streams), np.asarray(guesses)[: len(after)],
        np.asarray(leads)[: len(after)],
    )  # fmt: skip


@jax.jit
def _feed(
    model: Model,
    cache: Cache,
    head: Cache | None,
    newest: Float[Array, "B T M D"] | None,
    text: Int[Array, "context"],
    count: Int[Array, ""],
):
    """Return what `Replay` has after `count` tokens; `newest` is the prompt's h."""
    modules, config = model.modules(), model.config
    shape = ANCHOR_ROWS, config.hc_streams, config.hidden
    streams = jnp.zeros(shape)
    if newest is not None:
        streams = streams.at[-1].set(newest[0, 0])

    def chain(token, streams, head):
        assert modules.mtp is not None
        out = modules.mtp(modules.trunk, token, streams, head)
        kept, best = out.cache, jax.lax.top_k(out.logits[0, 0], 2)[0]
        guesses = [jnp.argmax(out.logits[0, 0])]
        for _ in range(MAX_DEPTH - 1):
            guess = guesses[-1].astype(jnp.int32).reshape(1, 1)
            out = modules.mtp(modules.trunk, guess, out.streams, out.cache)
            guesses.append(jnp.argmax(out.logits[0, 0]))
        return kept, jnp.stack(guesses).astype(jnp.int32), best[0] - best[1]

    def step(i, state):
        cache, head, _, streams, guesses, leads = state
        token = text[i].reshape(1, 1)
        if modules.mtp and head is not None:
            head, found, lead = chain(token, streams[None, -1:], head)
            guesses, leads = guesses.at[i].set(found), leads.at[i].set(lead)
        out = modules.trunk(token, cache)
        streams = jnp.concatenate([streams[1:], out.streams[0]])
        return out.cache, head, out.logits[0, 0], streams, guesses, leads

    nothing = jnp.zeros(config.vocab), streams
    drafts = jnp.zeros((len(text), MAX_DEPTH), jnp.int32), jnp.zeros(len(text))
    return jax.lax.fori_loop(0, count, step, (cache, head, *nothing, *drafts))


def distances(
    carry: DecodeCarry, replay: Replay, config: ModelConfig
) -> dict[str, float]:
    """Return how far a carry is from a replay of its text; see `distance`.

    Args:
      carry: B = 1, of a run under the warm policy with the head's rows filled.
      replay: of its tokens, as it should have committed them.
      config: of the model.

    Returns:
      `trunk`: tokens, logits and all the trunk holds of positions in reach; `anchor`:
      the streams that wait, and where; `head`: the rows that the head's next pass sees.
      The last two only where both have a head.
    """
    length, trunk = len(replay.tokens), [np.inf]
    if driver.committed(carry) == replay.tokens:
        trunk = [distance(carry.logits[0], replay.logits)]
        trunk += _trunk(carry, replay, config)
    found = {"trunk": max(trunk)}
    if carry.anchor is None or carry.mtp_cache is None or replay.head is None:
        return found
    rows = int(carry.anchor.rows[0])
    there = 0 < rows <= ANCHOR_ROWS and int(carry.anchor.position[0]) == length - 1
    wanted = replay.streams[ANCHOR_ROWS - rows :]
    found["anchor"] = (
        distance(carry.anchor.streams[0, :rows], wanted) if there else np.inf
    )
    layer, other = carry.mtp_cache.layers[0], replay.head.layers[0]
    assert layer.tags is not None
    seen = np.arange(max(length - rows - config.window + 1, 0), length - rows)
    slots = seen % layer.raw.shape[1]
    tagged = np.array_equal(np.asarray(layer.tags)[0, slots], seen)
    found["head"] = (
        distance(np.asarray(layer.raw)[0, slots], np.asarray(other.raw)[0, slots])
        if tagged
        else np.inf
    )
    return found


def _trunk(carry: DecodeCarry, replay: Replay, config: ModelConfig) -> Iterator[float]:
    """Yield the distances of the trunk's stores, as far as anything may look back."""
    length, reach = len(replay.tokens), int(carry.reach[0])

    def ring(found, wanted):
        # A rewind looks further back than the next pass: at all that is still there.
        size = found.shape[1]
        slots = np.arange(max(reach - size, 0), length) % size
        return distance(np.asarray(found)[0, slots], np.asarray(wanted)[0, slots])

    layers = zip(
        carry.cache.layers, replay.cache.layers, config.compress_ratios, strict=True
    )
    for layer, other, ratio in layers:
        yield ring(layer.raw, other.raw)
        for name in ("compressor", "indexer"):
            found, wanted = getattr(layer, name), getattr(other, name)
            if found is not None:
                assert name == "compressor" or ratio == CSA_RATIO
                yield ring(found.inputs, wanted.inputs)
                yield distance(
                    found.rows[0, : length // ratio], wanted.rows[0, : length // ratio]
                )


def distance(found: Array | np.ndarray, wanted: Array | np.ndarray) -> float:
    """Return how far arrays are apart: 0 if bit for bit equal, infinity if not numbers.

    Otherwise the norm of the difference relative to that of `wanted`, above 0.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    if np.array_equal(found, wanted):
        return 0.0
    wide = wanted.astype(np.float64)
    apart = np.linalg.norm(found - wide) / max(np.linalg.norm(wide), 1e-30)
    return max(float(apart), 1e-30) if np.isfinite(apart) else np.inf


def schedule(replay: Replay, mode: Mode) -> dict[str, list[int]]:
    """Return what the counters of a greedy run must be that committed these tokens.

    The drafts are the replay's; every cycle starts with an anchor; no token ends it.

    Args:
      replay: with a head, unless the mode is plain.
      mode: of the run.

    Returns:
      By the names of `carry.Statistics`, without `boots`; single counters as one entry.
    """
    text, at = replay.tokens[replay.prompt_length :], 0
    passes, decodes = 0, 0
    drafted, accepted = np.zeros((2, MAX_DEPTH), int)
    while at < len(text):
        if mode.kind == "chained":
            passes, decodes, at = passes + 1, decodes + 1, at + 1
            if at == len(text):
                break
        chain = replay.guesses[at, : mode.depth].tolist()
        most = min(mode.depth, len(text) - at - 1)
        kept = 0
        if mode.depth and replay.leads[at] >= mode.margin:
            drafted[:most] += 1
            while kept < most and chain[kept] == text[at + 1 + kept]:
                kept += 1
            accepted[:kept] += 1
        passes, at = passes + 1, at + 1 + kept
    return {
        "passes": [passes],
        "decodes": [decodes],
        "committed": [len(text)],
        "drafted": drafted.tolist(),
        "accepted": accepted.tolist(),
    }


class Whole(NamedTuple):
    """What one pass over a whole text, without a cache, says of it.

    Attributes:
      worst: the greatest gap of a token after the prompt, see `oracles`; in logits.
      newest: float32 [M, D], the streams of the prompt's last token.
      guesses: int32 [n]: the head's guess at each token but the first after the prompt
        and one more, with the true text before it; zeros without a head.
    """

    worst: float
    newest: np.ndarray
    guesses: np.ndarray


def whole(model: Model, replay: Replay, context: int) -> Whole:
    """Read a replay's text in a single pass, as training does.

    Args:
      model: the model.
      replay: whose text it is.
      context: rows of the pass, at least the text's; few sizes compile few programs.
    """
    count, start = len(replay.tokens), replay.prompt_length
    text = np.zeros((1, context), np.int32)
    text[0, :count] = replay.tokens
    gaps, streams, guesses = _whole(model, text, np.array([count], np.int32))
    here = slice(start - 1, count - 1)
    return Whole(
        worst=float(np.max(np.asarray(gaps)[here])),
        newest=np.asarray(streams)[start - 1],
        guesses=np.asarray(guesses)[here],
    )


@jax.jit
def _whole(model: Model, text: Int[Array, "B T"], count: Int[Array, "B"]):
    modules = model.modules()
    following = jnp.roll(text, -1, axis=1)
    out = modules.trunk(text, None, count)
    chosen = jnp.take_along_axis(out.logits[0], following[0, :, None], axis=1)[:, 0]
    gaps, guesses = out.logits[0].max(axis=1) - chosen, jnp.zeros(text.shape[1], int)
    if modules.mtp:
        head = modules.mtp(modules.trunk, following, out.streams, None, count - 1)
        guesses = jnp.argmax(head.logits[0], axis=1)
    return gaps, out.streams[0], guesses
