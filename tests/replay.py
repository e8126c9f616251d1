"""What later transitions can see of a carry, and the replay it is compared with.

A replay reads the same text from a fresh state by the plainest way: the same prefills,
then one token a pass.  It follows the numeric class of each token, since prefill rounds
otherwise than decode passes do: where a carry takes tokens back, the newest token left
is decoded again, and the replay decodes it too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np

from ds4jax.config import ModelConfig
from ds4jax.decode import carry as carries
from ds4jax.decode import driver, transitions
from ds4jax.decode.carry import Anchor, DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, PREFILL_CHUNK, Decoding
from ds4jax.model.cache import Cache, LayerCache
from ds4jax.model.deepseek import Model

CONFIG = models.micro_config()
CONTEXT = PREFILL_CHUNK

decode = jax.jit(transitions.decode, static_argnames="decoding")


@functools.cache
def guessing_model(config: ModelConfig = CONFIG) -> Model:
    """Return the lively model with a head that guesses right now and then.

    The head looks at the token rather than at the streams, as a trunk of random weights
    does; so a quarter of its first guesses are right, and now and then four in a row.
    """
    model = models.lively(config)
    factors = {"_down_": 0.5, "attn_output_b": 0.5, "h_proj": 0.1}
    head = dict(model.mtp)
    for name, weight in model.mtp.items():
        factor = next((f for part, f in factors.items() if part in name), 1.0)
        assert isinstance(weight, jax.Array)
        head[name] = weight * factor
    head["mtp.0.e_proj.weight"] = jnp.eye(config.hidden)
    head["mtp.0.enorm.weight"] = jnp.ones(config.hidden)
    head["mtp.0.norm.weight"] = model.trunk["output_norm.weight"]
    for part in ("fn", "base", "scale"):
        weight = model.trunk[f"output_hc_{part}.weight"]
        head[f"mtp.0.hc_head_{part}.weight"] = weight
    return dataclasses.replace(model, mtp=head)


def text(tokens: int, seed: int = 0) -> list[int]:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(CONFIG.vocab, size=tokens).tolist()


def start(model: Model, tokens: list[int], how: Decoding = CONTINUOUS) -> DecodeCarry:
    """Return a carry that has read a text and may fill the context."""
    return driver.start(model, tokens, CONTEXT - len(tokens), how)


def empty(config: ModelConfig = CONFIG) -> DecodeCarry:
    """Return a carry without tokens, with the state of a head."""
    return carries.create(config, CONTEXT, mtp=True)


def anchor(carry: DecodeCarry) -> Anchor:
    """Return the anchor of a carry that has the state of a head."""
    assert carry.anchor is not None
    return carry.anchor


def copy(carry: DecodeCarry) -> DecodeCarry:
    """Return a copy, to be given to a function that takes its argument's memory."""
    return jax.tree.map(jnp.copy, carry)


class Replay:
    """A text read from a fresh state, by prefills and one token a pass.

    Attributes:
      states: the carry before each step and after the last.  Its policy is warm and the
        head's rows are filled, so that it has what any other policy has.
      steps: (tokens, whether they were prefilled) of each step.
    """

    def __init__(self, model: Model):
        self.model = model
        self.states = [empty(model.config)]
        self.steps: list[tuple[list[int], bool]] = []

    @property
    def state(self) -> DecodeCarry:
        return self.states[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for tokens, _ in self.steps for token in tokens]

    def best(self) -> int:
        """Return the token that the logits decide."""
        return int(np.argmax(self.state.logits[0]))

    def prefill(self, tokens: list[int], following: int = -1):
        """Read a chunk; a `following` token >= 0 is known of to the head alone."""
        chunk = np.zeros((1, CONTEXT), np.int32)
        chunk[0, : len(tokens)] = tokens
        state = driver._prefill(
            self.model, copy(self.state), chunk,
            np.array([following], np.int32), np.array([len(tokens)], np.int32),
            decoding=CONTINUOUS,
        )  # fmt: skip
        self._add(state, tokens, True)

    def decode(self, token: int):
        """Read a token in a pass of its own."""
        state = decode(self.model, self.state, np.array([token], np.int32), CONTINUOUS)
        self._add(state, [token], False)

    def _add(self, state, tokens, prefilled):
        self.states.append(state)
        self.steps.append((list(tokens), prefilled))

    def rewind(self, length: int):
        """Read again, from a fresh state, the first `length` tokens alone."""
        newest = self.tokens[length - 1]
        while True:
            tokens, prefilled = self.steps.pop()
            self.states.pop()
            if (start := len(self.tokens)) < length:
                break
        if prefilled and length - 1 > start:
            self.prefill(tokens[: length - 1 - start], following=newest)
        self.decode(newest)

    def streams(self, length: int):
        """Return the streams of the newest of the first `length` tokens [M, D]."""
        ends = np.cumsum([len(tokens) for tokens, _ in self.steps])
        state = self.states[1 + ends.tolist().index(length)]
        return np.asarray(anchor(state).streams[0, 0])


def head_rows(carry: DecodeCarry) -> dict[int, np.ndarray]:
    """Return, by position, the head's rows that a tag vouches for.

    Those that wait in the anchor are not among them: the head's next pass begins by
    writing them.
    """
    assert carry.mtp_cache is not None
    layer = carry.mtp_cache.layers[0]
    tags, raw = np.asarray(layer.tags)[0], np.asarray(layer.raw)[0]
    end = int(carry.length[0] - anchor(carry).rows[0])
    return {int(t): raw[slot] for slot, t in enumerate(tags) if 0 <= t < end}


def assert_same_text(
    actual: DecodeCarry, expected: DecodeCarry, config: ModelConfig = CONFIG
):
    """Compare all that matters to plain decoding: tokens, logits, the trunk's cache."""
    assert driver.committed(actual) == driver.committed(expected)
    np.testing.assert_array_equal(actual.logits, expected.logits)
    models.assert_same_state(actual.cache, expected.cache, config)


def assert_head_rows(carry: DecodeCarry, expected: DecodeCarry, gaps: bool = False):
    """Compare the head's rows that both carries have.

    Unless there may be `gaps`, `carry` must have all that the head's next pass sees.
    """
    found, wanted = head_rows(carry), head_rows(expected)
    for position in found.keys() & wanted.keys():
        np.testing.assert_array_equal(found[position], wanted[position])
    end = int(carry.length[0] - anchor(carry).rows[0])
    missing = set(range(max(end - CONFIG.window + 1, 0), end)) - found.keys()
    assert gaps or not missing, f"no rows {missing}, end {end}"


def assert_anchor(carry: DecodeCarry, replay: Replay):
    """Compare the anchor with the replay's streams: invariant I1, of every row."""
    streams, rows = anchor(carry).streams, int(anchor(carry).rows[0])
    length = int(carry.length[0])
    assert 0 <= rows <= carries.ANCHOR_ROWS
    if not rows:
        return
    assert int(anchor(carry).position[0]) == length - 1
    for i in range(rows):
        np.testing.assert_array_equal(
            streams[0, i], replay.streams(length - rows + 1 + i)
        )


def poisoned(carry: DecodeCarry, least: int | None = None) -> DecodeCarry:
    """Return `carry` with garbage in all that nothing may see: NaN, or wrong integers.

    Args:
      carry: one sequence.
      least: length down to which a later rewind is to stay exact; by default there is
        to be none.
    """
    length = int(carry.length[0])
    # A rewind decodes the last token it keeps, so it looks from one before.
    lengths = {length} | set(range(length if least is None else least - 1, length))
    kept, head = anchor(carry), carry.mtp_cache
    assert head is not None
    rows = int(kept.rows[0])
    layer = head.layers[0]
    seen = _live(
        Cache((LayerCache(layer.raw),), head.length),
        {min(at, length - rows) for at in lengths},
    )
    size = layer.raw.shape[1]
    held = np.arange(size) + size * ((length - rows - 1 - np.arange(size)) // size)
    stale = np.asarray(layer.tags)[0] != held
    shown = seen.layers[0].raw
    assert shown is not None and layer.tags is not None
    raw = jnp.where(stale[None, :, None], np.nan, shown)
    # A tag of an earlier lap is what a slot would keep if nobody had written it.
    blank = np.isnan(np.asarray(raw)).all(-1)
    tags = jnp.where(blank, held - size, layer.tags)
    after = np.arange(CONTEXT) >= length
    waiting = np.arange(carries.ANCHOR_ROWS) < rows
    return dataclasses.replace(
        carry,
        cache=dataclasses.replace(_live(carry.cache, lengths), length=carry.length),
        mtp_cache=Cache((LayerCache(raw, tags=tags),), head.length),
        tokens=jnp.where(after, 2**30, carry.tokens),
        anchor=dataclasses.replace(
            kept,
            streams=jnp.where(waiting[:, None, None], kept.streams, np.nan),
            position=kept.position if rows else kept.position - 999,
        ),
    )


def _live(cache: Cache, lengths: set[int]) -> Cache:
    """Return `cache` with NaN in what is seen at none of `lengths`."""
    at = lambda n: dataclasses.replace(cache, length=jnp.full_like(cache.length, n))  # noqa: E731
    views = [models.poison(at(n), CONFIG) for n in sorted(lengths)]
    return jax.tree.map(lambda *x: functools.reduce(_either, x), *views)


def _either(one, other):
    return jnp.where(jnp.isnan(one), other, one)
