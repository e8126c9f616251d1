"""The drivers: a text in, committed tokens out, all cycles on the device.

Jit lives here and nowhere below.  One compiled program runs any number of cycles, so
streaming is calling it with a small limit and reading the new tokens in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.decode import carry as carries
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.transitions import PREFILL_CHUNK, cycles, prefill_chunk
from ds4jax.errors import CapacityError, TokenError
from ds4jax.model.deepseek import Model

_prefill = jax.jit(prefill_chunk, donate_argnames="carry")
_cycles = jax.jit(cycles, static_argnames="depth", donate_argnames="carry")


def start(
    model: Model, prompt: Sequence[int], max_tokens: int, depth: int
) -> DecodeCarry:
    """Return a carry that has read `prompt` and may commit `max_tokens` more.

    Args:
      model: the model; its head is used if `depth` asks for drafts.
      prompt: at least one token.
      max_tokens: budget; sets the context.
      depth: of the drafts; 0 for plain decoding.

    Raises:
      TokenError: if the prompt is empty or an id is not in the vocabulary.
      CapacityError: if `max_tokens` is negative.
      ConfigError: if drafts are asked of a model without a head.
    """
    if not len(prompt):
        raise TokenError("prompt: expected at least one token, found none")
    vocab = model.config.vocab
    for token in prompt:
        if not 0 <= token < vocab:
            raise TokenError(f"prompt: expected ids in 0..{vocab - 1}, found {token}")
    if max_tokens < 0:
        raise CapacityError(f"max_tokens: expected at least 0, found {max_tokens}")
    carry = carries.create(
        model.config, _context(len(prompt) + max_tokens), depth=depth,
        mtp=depth > 0 and bool(model.mtp),
    )  # fmt: skip
    carry = prefill(model, carry, prompt)
    return dataclasses.replace(carry, budget=jnp.array([max_tokens], jnp.int32))


def _context(tokens: int) -> int:
    """Return a context that holds `tokens`, rounded up so that few sizes compile."""
    return -(-tokens // PREFILL_CHUNK) * PREFILL_CHUNK


def prefill(model: Model, carry: DecodeCarry, tokens: Sequence[int]) -> DecodeCarry:
    """Commit a text that is known to follow, a chunk at a time."""
    for at in range(0, len(tokens), PREFILL_CHUNK):
        part = np.zeros((1, PREFILL_CHUNK), np.int32)
        piece = tokens[at : at + PREFILL_CHUNK]
        part[0, : len(piece)] = piece
        following = tokens[at + len(piece)] if at + len(piece) < len(tokens) else -1
        carry = _prefill(
            model, carry, part,
            np.array([following], np.int32), np.array([len(piece)], np.int32),
        )  # fmt: skip
    return carry


def run(
    model: Model, carry: DecodeCarry, depth: int, eos: int = -1, limit: int = 2**30
) -> DecodeCarry:
    """Run cycles on the device until every sequence is done, or `limit` of them."""
    return _cycles(model, carry, jnp.int32(eos), jnp.int32(limit), depth=depth)


def stream(
    model: Model, carry: DecodeCarry, depth: int, eos: int = -1, every: int = 8
) -> Iterator[tuple[DecodeCarry, list[int]]]:
    """Yield (carry, new tokens) of the first sequence every few cycles.

    The tokens are those of one `run`, bit for bit.
    """
    seen = int(carry.length[0])
    while bool(carry.active[0]):
        carry = run(model, carry, depth, eos, every)
        tokens = committed(carry)
        yield carry, tokens[seen:]
        seen = len(tokens)


def committed(carry: DecodeCarry, sequence: int = 0) -> list[int]:
    """Return the tokens of one sequence."""
    length = int(carry.length[sequence])
    # Sliced on the host: on the device each length would be compiled.
    return np.asarray(carry.tokens)[sequence, :length].tolist()
