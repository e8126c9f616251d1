"""A session: the drivers' functions around one carry, for notebooks and programs.

    config, trunk = gguf.load_trunk(assets.trunk())
    model = deepseek.build(config, trunk, gguf.load_mtp(assets.mtp(), config))
    session = Session(model, max_context=4096)
    session.sync([1, 2, 3])
    print(session.generate(max_tokens=64))

With a tokenizer it reads texts, and stops at them:

    session = Session(model, max_context=4096, tokenizer=tokenizer)
    session.sync("It was a bright morning, and")
    print(tokenizer.decode(session.generate(max_tokens=64, stop=["."])))

It adds no way of decoding.  It sees to it that a carry which was given up is never
used again, and what a function refuses leaves the session as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, payload
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.driver import Synced
from ds4jax.decode.modes import CONTINUOUS, Decoding
from ds4jax.decode.stops import Stop, Stops, stream
from ds4jax.errors import CapacityError, ConfigError, TokenError
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer


class Session:
    """One sequence, and how it is decoded.

    Attributes:
      model: the model.
      decoding: of every call.
      tokenizer: reads the texts; None where all is ids.
    """

    def __init__(
        self,
        model: Model,
        max_context: int,
        decoding: Decoding = CONTINUOUS,
        *,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ):
        """Start without tokens.

        Args:
          model: the model.
          max_context: most tokens, rounded up as by `driver.create`.
          decoding: how to decode.
          tokenizer: of the model, to take texts.
          seed: of the noise of sampling.

        Raises:
          ConfigError: if drafts are asked of a model without a head.
          CapacityError: if `max_context` is not positive.
        """
        self.model = model
        self.decoding = decoding
        self.tokenizer = tokenizer
        self._hold(driver.create(model, max_context, decoding, seed))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Model,
        max_context: int | None = None,
        decoding: Decoding = CONTINUOUS,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> Session:
        """Return the session that `save` wrote; see `payload.restore`.

        Raises:
          FileError, ConfigError, CapacityError: as `payload.restore`.
        """
        carry = payload.restore(path, model, max_context, decoding)
        session = cls(model, 1, decoding, tokenizer=tokenizer)
        session._hold(carry)
        return session

    def save(self, path: str | Path):
        """Write the session to a file; see `payload.save`.

        Raises:
          FileError: if it cannot be written.
        """
        payload.save(path, self.model, self._carry)

    @property
    def tokens(self) -> list[int]:
        """Return the committed tokens, the prompt among them."""
        return driver.committed(self._carry)

    @property
    def length(self) -> int:
        """Return the number of committed tokens."""
        return int(self._carry.length[0])

    @property
    def max_context(self) -> int:
        """Return the most tokens there may be."""
        return self._carry.max_context

    @property
    def statistics(self) -> dict[str, int]:
        """Return the counters since the last `generate` or `stream` began.

        What a stop took back is among the committed tokens.
        """
        return self._carry.statistics.of()

    def sync(self, prompt: str | Sequence[int]) -> Synced:
        """Make `prompt` the committed text; see `driver.sync`.

        Args:
          prompt: ids; or a text, which is read after a BOS.  To go on from what is
            there, give `tokens` and more: a text may be cut into other tokens.

        Returns:
          What was done with the tokens already there.

        Raises:
          ConfigError: if it is a text and there is no tokenizer.
          TokenError: if it is empty or cannot be expressed in the vocabulary.
          CapacityError: if it leaves no room for one more token.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError(
                    f"prompt: expected ids where there is no tokenizer, found "
                    f"{prompt!r:.40}"
                )
            prompt = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        with self._giving_up():
            self._carry, done = driver.sync(
                self.model, self._carry, prompt, self.decoding
            )
        return done

    def generate(
        self,
        max_tokens: int,
        eos: int | None = None,
        stop: Stop | Sequence[Stop] = (),
    ) -> list[int]:
        """Return the tokens of `stream`."""
        return [t for new in self.stream(max_tokens, eos, stop) for t in new]

    def stream(
        self,
        max_tokens: int,
        eos: int | None = None,
        stop: Stop | Sequence[Stop] = (),
        every: int = 8,
    ) -> Iterator[list[int]]:
        """Decode, yielding the new tokens every few cycles.

        What was yielded is committed, and nothing else once the stream has ended.  It
        may be left at any point; it ends early if the session is used otherwise.  An
        interrupt while the device computes leaves its tokens committed, not yielded.

        Args:
          max_tokens: most tokens; the context may end before.
          eos: token that ends it, committed itself; by default the tokenizer's if there
            is one; -1 for none.
          stop: texts or lists of ids; the tokens end with the one that completes any.
          every: most cycles between two yields.

        Raises:
          ConfigError: if `max_tokens` is negative, or for a stop as `stops.Stops`.
          TokenError: if there is no token to go on from.
          CapacityError: if the context is full.
        """
        stops = Stops(stop, self.tokenizer)
        length = self.length
        if not length:
            raise TokenError("session: expected tokens to go on from; sync a prompt")
        if length == self.max_context:
            raise CapacityError(
                f"context: all of its {length} tokens are used; sync a shorter text or"
                " use a larger context"
            )
        if eos is None:
            eos = self.tokenizer.eos if self.tokenizer else -1
        self._carry = carries.with_budget(self._carry, max_tokens)
        return self._stream(eos, stops, every)

    def _stream(self, eos: int, stops: Stops, every: int) -> Iterator[list[int]]:
        with self._giving_up():
            for carry, new in stream(
                self.model, self._carry, self.decoding, eos, stops, every, self._hold
            ):
                yield new
                if carry is not self._carry:
                    return

    def rewind(self, length: int):
        """Take back all but the first `length` tokens; see `driver.rewind`.

        Raises:
          CapacityError: if that is out of reach of the rings, or is not a shorter text.
        """
        with self._giving_up():
            self._carry = driver.rewind(self.model, self._carry, length, self.decoding)

    def invalidate(self):
        """Forget every token."""
        with self._giving_up():
            self._carry = driver.invalidate(self._carry)

    def _hold(self, carry: DecodeCarry):
        self._carry = carry

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Let a block give up the carry; one that fails halfway forgets every token."""
        rng = jnp.copy(self._carry.rng)
        try:
            yield
        except BaseException:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._carry)):
                fresh = driver.create(self.model, self.max_context, self.decoding)
                self._carry = dataclasses.replace(fresh, rng=rng)
            raise
