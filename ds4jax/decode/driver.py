"""The drivers: a text in, committed tokens out, all cycles on the device.

Jit lives here and nowhere below.  One compiled program runs any number of cycles, so
streaming is calling it with a small limit and reading the new tokens in between.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.decode import carry as carries
from ds4jax.decode import cycles, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, PREFILL_CHUNK, Decoding
from ds4jax.errors import CapacityError, ConfigError, TokenError
from ds4jax.model.cache import DEFAULT_SLACK
from ds4jax.model.deepseek import Model

Synced = Literal["kept", "extended", "rewound", "rebuilt"]
"""What `sync` could do with the tokens already there."""

_compile = functools.partial(
    jax.jit, static_argnames="decoding", donate_argnames="carry"
)
# Where no clock may choose a tile, XLA's own products of many rows take ten times as
# long as the library's, and more.
_prefill = _compile(
    transitions.prefill, compiler_options={"xla_gpu_enable_triton_gemm": False}
)
_rewind = _compile(transitions.rewind)
_cycles = _compile(cycles.cycles)
_invalidate = jax.jit(transitions.invalidate, donate_argnames="carry")
_drop_anchor = jax.jit(
    lambda carry: transitions.drop_anchor(carry, jnp.ones_like(carry.done)),
    donate_argnums=0,
)


def create(
    model: Model,
    max_context: int,
    decoding: Decoding = CONTINUOUS,
    seed: int = 0,
    head: bool = False,
) -> DecodeCarry:
    """Return a carry without tokens for one sequence, B = 1.

    Args:
      model: the model.
      max_context: most tokens the sequence may hold, rounded up to a multiple of
        PREFILL_CHUNK so that few sizes compile.
      decoding: what it will be used with.
      seed: of the noise of sampling.
      head: keep the state of the model's head even if decoding is plain, to draft
        later; it costs a pass of the head every few tokens.

    Raises:
      ConfigError: if drafts are asked of a model without a head.
    """
    drafts = decoding.mode.depth > 0 or head
    if drafts and not model.mtp:
        raise ConfigError(
            "model: expected one with an MTP head to draft with, found a trunk alone"
        )
    rounded = -(-max_context // PREFILL_CHUNK) * PREFILL_CHUNK
    return carries.create(model.config, rounded, mtp=drafts, seed=seed)


def start(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int,
    decoding: Decoding = CONTINUOUS,
    seed: int = 0,
    head: bool = False,
) -> DecodeCarry:
    """Return a carry that has read `prompt` and may commit `max_tokens` more.

    The other arguments are those of `create`.

    Raises:
      TokenError: if the prompt is empty or an id is not in the vocabulary.
      ConfigError: if `max_tokens` is negative, or as `create`.
    """
    _check_prompt(model, prompt)
    carry = create(model, len(prompt) + max(max_tokens, 0), decoding, seed, head)
    carry = prefill(model, carry, prompt, decoding)
    return carries.with_budget(carry, max_tokens)


def _check_prompt(model: Model, prompt: Sequence[int]):
    if not len(prompt):
        raise TokenError("prompt: expected at least one token, found none")
    check_ids("prompt", prompt, model.config.vocab)


def check_ids(name: str, tokens: Sequence[int], vocab: int):
    """Compare ids with the vocabulary.

    Raises:
      TokenError: if one is outside it; `name` says whose.
    """
    for token in tokens:
        if not 0 <= token < vocab:
            raise TokenError(f"{name}: expected ids in 0..{vocab - 1}, found {token}")


def prefill(
    model: Model,
    carry: DecodeCarry,
    tokens: Sequence[int],
    decoding: Decoding = CONTINUOUS,
) -> DecodeCarry:
    """Commit a text that is known to follow, a chunk at a time.

    Raises:
      CapacityError: if it does not fit the context.
    """
    _check_room(carry, int(carry.length[0]) + len(tokens))
    chunk = decoding.prefill_chunk
    for at in range(0, len(tokens), chunk):
        part = np.zeros((1, chunk), np.int32)
        piece = tokens[at : at + chunk]
        part[0, : len(piece)] = piece
        following = tokens[at + len(piece)] if at + len(piece) < len(tokens) else -1
        carry = _prefill(
            model, carry, part,
            np.array([following], np.int32), np.array([len(piece)], np.int32),
            decoding=decoding,
        )  # fmt: skip
    return carry


def _check_room(carry: DecodeCarry, length: int):
    if length > carry.max_context:
        raise CapacityError(
            f"context: {length} tokens do not fit in {carry.max_context}; "
            "expected a shorter text or a larger context"
        )


def rewind_limit(carry: DecodeCarry) -> int:
    """Return the least length that the first sequence can be rewound to exactly."""
    return max(1, int(carry.reach[0]) - DEFAULT_SLACK)


def rewind(
    model: Model, carry: DecodeCarry, length: int, decoding: Decoding = CONTINUOUS
) -> DecodeCarry:
    """Take back all but the first `length` tokens of the first sequence.

    Raises:
      CapacityError: if that is out of reach of the rings, or is not a shorter text.
    """
    least, most = rewind_limit(carry), int(carry.length[0])
    if not least <= length <= most:
        raise CapacityError(
            f"rewind: expected a length in {least}..{most}, found {length}; "
            "sync rebuilds from the tokens instead"
        )
    target = jnp.full_like(carry.length, length)
    return _rewind(model, carry, target, decoding=decoding)


def invalidate(carry: DecodeCarry) -> DecodeCarry:
    """Forget every token; see `transitions.invalidate`."""
    return _invalidate(carry)


def sync(
    model: Model,
    carry: DecodeCarry,
    prompt: Sequence[int],
    decoding: Decoding = CONTINUOUS,
) -> tuple[DecodeCarry, Synced]:
    """Make `prompt` the committed text, with as little work as the rings allow.

    What both texts begin with is kept if the rest can be taken back, else all is read
    again.  (ds4 keeps it only if nothing has to be taken back.)

    Args:
      model: the model.
      carry: one sequence; given up.
      prompt: the text.
      decoding: as of the cycles.

    Returns:
      The carry, and what was done.

    Raises:
      TokenError: if the prompt is empty or an id is not in the vocabulary.
      CapacityError: if it leaves no room in the context for one more token.
    """
    _check_prompt(model, prompt)
    _check_room(carry, len(prompt) + 1)
    live = committed(carry)
    same = next(
        (i for i, (a, b) in enumerate(zip(live, prompt, strict=False)) if a != b),
        min(len(live), len(prompt)),
    )
    if same == len(live) and live:
        if len(prompt) > same:
            return prefill(model, carry, prompt[same:], decoding), "extended"
        if decoding.policy == "parity":
            carry = _drop_anchor(carry)
        return carry, "kept"
    if same and same >= rewind_limit(carry):
        carry = rewind(model, carry, same, decoding)
        return prefill(model, carry, prompt[same:], decoding), "rewound"
    carry = invalidate(carry)
    return prefill(model, carry, prompt, decoding), "rebuilt"


def run(
    model: Model,
    carry: DecodeCarry,
    decoding: Decoding = CONTINUOUS,
    eos: int = -1,
    limit: int = 2**30,
) -> DecodeCarry:
    """Run cycles on the device until every sequence is done, or `limit` of them."""
    return _cycles(model, carry, jnp.int32(eos), jnp.int32(limit), decoding=decoding)


def stream(
    model: Model,
    carry: DecodeCarry,
    decoding: Decoding = CONTINUOUS,
    eos: int = -1,
    every: int = 8,
    keep: Callable[[DecodeCarry], object] = lambda carry: None,
) -> Iterator[tuple[DecodeCarry, list[int]]]:
    """Yield (carry, new tokens) of the first sequence every few cycles.

    The tokens are those of one `run`, bit for bit.

    Args:
      model: the model.
      carry: given up.
      decoding: of the cycles.
      eos: token that ends a sequence, -1 for none.
      every: most cycles between two yields.
      keep: given each carry at once when it replaces the one before, which is gone;
        for who wants to go on after an interrupt.
    """
    seen = int(carry.length[0])
    while bool(carry.active[0]):
        carry = run(model, carry, decoding, eos, every)
        keep(carry)
        tokens = committed(carry)
        yield carry, tokens[seen:]
        seen = len(tokens)


def committed(carry: DecodeCarry, sequence: int = 0) -> list[int]:
    """Return the tokens of one sequence."""
    length = int(carry.length[sequence])
    # Sliced on the host: on the device each length would be compiled.
    return np.asarray(carry.tokens)[sequence, :length].tolist()


def digest(tokens: Sequence[int]) -> str:
    """Return the sha256 of tokens, as little-endian int32, to compare runs by."""
    return hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest()
