"""Stop sequences: a stream that ends, committed tokens included, where one is complete.

ds4's server looks for stops after a block was committed, and what a draft brought
beyond them stays in the session: the next prompt then no longer extends it, and all is
read again (antirez/ds4#905).  Here what is beyond is taken back by a rewind, which is
arithmetic, and few enough cycles run between two looks that it is always in reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ds4jax.decode import driver
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, Decoding
from ds4jax.errors import ConfigError
from ds4jax.model.cache import DEFAULT_SLACK
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

Stop = str | Sequence[int]
"""A text, or token ids."""


class Stops:
    """Looks for stops in a stream of tokens, whatever pieces it comes in.

    Texts are compared as UTF-8, so a character may be cut by tokens; a special token
    reads as the text it prints.
    """

    def __init__(
        self, stops: Stop | Sequence[Stop] = (), tokenizer: Tokenizer | None = None
    ):
        """Start before the first token.

        Args:
          stops: any of them ends the stream; one text may stand alone.
          tokenizer: of the stream; texts need it.

        Raises:
          ConfigError: for a stop that is empty or neither text nor ids, or a text
            without a tokenizer.
        """
        self._texts: list[bytes] = []
        self._ids: list[list[int]] = []
        for stop in (stops,) if isinstance(stops, str) else stops:
            if isinstance(stop, int):
                raise ConfigError(f"stop: expected texts or lists of ids, found {stop}")
            if not stop:
                raise ConfigError(f"stop: expected something to find, found {stop!r}")
            if not isinstance(stop, str):
                self._ids.append(list(stop))
            elif tokenizer is None:
                raise ConfigError(
                    f"stop: expected ids where there is no tokenizer, found {stop!r}"
                )
            else:
                self._texts.append(stop.encode())
        self._bytes_of = tokenizer.token_bytes if tokenizer else ()
        self._bytes_kept = max(map(len, self._texts), default=1) - 1
        self._ids_kept = max(map(len, self._ids), default=1) - 1
        self._last_bytes = b""
        self._last_ids: list[int] = []

    def __bool__(self) -> bool:
        """Say whether there is any stop."""
        return bool(self._texts or self._ids)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return how many of the next tokens there are up to the end of a stop.

        The token that completes it counts.  None if no stop is complete yet; its
        beginning is remembered.
        """
        for count, token in enumerate(tokens, 1):
            if self._completes(token):
                return count
        return None

    def _completes(self, token: int) -> bool:
        ids, text = [*self._last_ids, token], self._last_bytes
        if self._texts:
            text += self._bytes_of[token]
        self._last_ids = ids[max(len(ids) - self._ids_kept, 0) :]
        self._last_bytes = text[max(len(text) - self._bytes_kept, 0) :]
        # What came before had no stop, so one that is there now ends in this token.
        return any(stop in text for stop in self._texts) or any(
            ids[-len(stop) :] == stop for stop in self._ids
        )


def most_cycles(decoding: Decoding) -> int:
    """Return after how many cycles all but one token can still be taken back."""
    rows = 1 + decoding.mode.depth + (decoding.mode.kind == "chained")
    return DEFAULT_SLACK // rows


def stream(
    model: Model,
    carry: DecodeCarry,
    decoding: Decoding = CONTINUOUS,
    eos: int = -1,
    stops: Stops | None = None,
    every: int = 8,
    keep: Callable[[DecodeCarry], object] = lambda carry: None,
) -> Iterator[tuple[DecodeCarry, list[int]]]:
    """Yield (carry, new tokens) of the one sequence, up to the end of a stop.

    The tokens are those of `driver.stream`, the last one that of the stop, and those
    of the carry end with it.  The prompt is not searched.

    Args:
      model: the model.
      carry: one sequence; given up.
      decoding, eos, every, keep: as of `driver.stream`.
      stops: a fresh one; None for none.
    """
    if stops is None:
        stops = Stops()
    elif stops:
        every = min(every, most_cycles(decoding))
    for now, new in driver.stream(model, carry, decoding, eos, every, keep):
        count = stops.find(new)
        if count is None:
            yield now, new
            continue
        if beyond := len(new) - count:
            now = driver.rewind(model, now, int(now.length[0]) - beyond, decoding)
            keep(now)
        yield now, new[:count]
        return
