"""From tokens to training batches, and prompts that ask for a copy.

Speculation can only be measured on a model that predicts something well.  Besides
ordinary text the batches therefore hold *copy documents*, a passage followed by itself,
from which even a tiny model learns to repeat; and `copy_prompts` makes the held-out
prompts on which that is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ds4jax.errors import ConfigError
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import Document, Tokens, tokenise

PASSAGE_TOKENS = (24, 400)
"""Shortest and longest passage of a copy document."""

SEPARATOR = "\n\n"
"""Stands between a passage and its copy."""

CODE_WEIGHT = 2.0
"""How much likelier a passage of the class `code` is than its share of the tokens."""


class Batches:
    """Training batches as a pure function of (seed, step): resuming needs only those.

    A sequence is either a random window of one class, or, with probability
    `copy_share`, copy documents until it is full:

        BOS passage separator passage EOS  BOS passage ...

    A passage starts at a line of any class, `code` being likelier, and has a random
    length; the last copy document ends where the window does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens_by_class: Mapping[str, Tokens],
        batch: int,
        rows: int,
        copy_share: float,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ):
        """Index the tokens.

        Args:
          tokenizer: made the tokens.
          tokens_by_class: what `tokenise` gave for each class.
          batch: B, sequences of a batch.
          rows: T, rows of the forward pass; windows are T + 2 wide, because the trunk
            learns the next token and the MTP head the one after it.
          copy_share: probability that a sequence is made of copy documents.
          seed: any non-negative integer.
          weights: relative frequency of each class among the windows; by default its
            share of the tokens.

        Raises:
          ConfigError: for an argument out of range, a class without tokens, or weights
            of other classes.
        """
        for name, value, least in (("batch", batch, 1), ("rows", rows, 1),
                                   ("seed", seed, 0)):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name}: expected at least {least}, found {value}")
        if not 0 <= copy_share <= 1:
            raise ConfigError(f"copy_share: expected 0..1, found {copy_share}")
        sizes = {name: tokens.size for name, tokens in tokens_by_class.items()}
        if not sizes or not all(sizes.values()):
            raise ConfigError(f"tokens: expected some in every class, found {sizes}")
        weights = sizes if weights is None else weights
        if weights.keys() != sizes.keys() or not (
            min(weights.values()) >= 0 and sum(weights.values()) > 0
        ):
            raise ConfigError(
                f"weights: expected one for each of {[*sizes]}, none negative and not "
                f"all 0, found {dict(weights)}"
            )
        self.batch, self.width = batch, rows + 2
        self.copy_share, self.seed = copy_share, seed
        self._flat = np.concatenate(list(tokens_by_class.values()))
        self._size = np.array([*sizes.values()])
        self._offset = np.cumsum(self._size) - self._size
        self._share = _normalised(np.array([weights[name] for name in sizes]))
        self._copies = _CopyWriter(tokenizer)
        if copy_share:
            self._index_passages(tokens_by_class)

    def _index_passages(self, tokens_by_class: Mapping[str, Tokens]):
        found = [
            self._copies.passages(tokens, PASSAGE_TOKENS[0])
            for tokens in tokens_by_class.values()
        ]
        self._lines = np.array([start.size for start, _ in found])
        if not self._lines.any():
            raise ConfigError(
                f"copy_share: no document has {PASSAGE_TOKENS[0]} tokens to copy; add "
                "longer text or set it to 0"
            )
        self._first_line = np.cumsum(self._lines) - self._lines
        self._line_start = np.concatenate(
            [start + at for (start, _), at in zip(found, self._offset, strict=True)]
        )
        self._line_room = np.concatenate([room for _, room in found])
        favour = [CODE_WEIGHT if name == "code" else 1.0 for name in tokens_by_class]
        self._line_share = _normalised(self._size * favour * (self._lines > 0))

    def at(self, step: int) -> Int32[np.ndarray, "B width"]:
        """Return the windows, T + 2 wide, of `step`, counted from 0."""
        rng = np.random.default_rng([self.seed, step])
        group = rng.choice(self._size.size, self.batch, p=self._share)
        size = self._size[group, None]
        # A window wraps round the end of its class, so that any class is long enough.
        start = (rng.random((self.batch, 1)) * size).astype(np.int64)
        inside = (start + np.arange(self.width)) % size
        out = self._flat[self._offset[group, None] + inside].astype(np.int32)
        copies = np.flatnonzero(rng.random(self.batch) < self.copy_share)
        if copies.size:
            self._write_copies(rng, out, copies)
        return out

    def _write_copies(self, rng: np.random.Generator, out: np.ndarray, at: np.ndarray):
        # Drawn at once for all sequences: as many as the shortest passages would take.
        shape = (at.size, -(-self.width // self._copies.length(PASSAGE_TOKENS[0])))
        group = rng.choice(self._lines.size, shape, p=self._line_share)
        line = self._first_line[group] + (
            rng.random(shape) * self._lines[group]
        ).astype(np.int64)
        length = rng.integers(PASSAGE_TOKENS[0], PASSAGE_TOKENS[1] + 1, shape)
        start = self._line_start[line]
        stop = start + np.minimum(length, self._line_room[line])
        for row, starts, stops in zip(at, start.tolist(), stop.tolist(), strict=True):
            filled = 0
            for a, b in zip(starts, stops, strict=True):
                text = self._copies.write(self._flat[a:b])[: self.width - filled]
                out[row, filled : filled + text.size] = text
                filled += text.size
                if filled == self.width:
                    break


class CopyPrompt(NamedTuple):
    """A prompt whose best continuation is known.

    Attributes:
      prompt: BOS, a passage, the separator and the start of the passage's copy.
      continuation: the rest of the copy.
    """

    prompt: Int32[np.ndarray, " n"]
    continuation: Int32[np.ndarray, " m"]


def copy_prompts(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    count: int,
    passage: int,
    seen: int,
    seed: int,
) -> list[CopyPrompt]:
    """Draw `count` prompts that ask for a copy of a passage of the documents.

    Args:
      documents: held-out documents.
      tokenizer: the model's.
      count: how many.
      passage: tokens of a passage, as `text_prompts` draws it.
      seen: tokens of the copy that the prompt already holds.
      seed: any non-negative integer.

    Raises:
      ConfigError: if `seen` is not below `passage`, or as `text_prompts`.
    """
    if not 0 <= seen < passage:
        raise ConfigError(f"seen: expected 0..{passage - 1}, found {seen}")
    copies = _CopyWriter(tokenizer)
    prompts = []
    for prompt in text_prompts(documents, tokenizer, count, passage, seed):
        text = copies.write(prompt[1:])[:-1]
        cut = text.size - (passage - seen)
        prompts.append(CopyPrompt(text[:cut], text[cut:]))
    return prompts


def text_prompts(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    count: int,
    passage: int,
    seed: int,
) -> list[Int32[np.ndarray, " n"]]:
    """Draw `count` prompts: BOS and a passage of the documents.

    As long as there are documents enough, no two are from the same one.

    Args:
      documents: held-out documents.
      tokenizer: the model's.
      count: how many.
      passage: tokens of a passage; it starts at a line and ends within its document.
      seed: any non-negative integer.

    Raises:
      ConfigError: if the documents hold fewer than `count` lines with a passage after
        them.
    """
    tokens = tokenise(tokenizer, documents)
    start, _ = _CopyWriter(tokenizer).passages(tokens, passage)
    if start.size < count:
        raise ConfigError(
            f"count: expected at most {start.size}, the lines that {passage} tokens "
            f"follow in {len(documents)} documents, found {count}"
        )
    start = np.random.default_rng(seed).permutation(start)
    document = np.cumsum(tokens == tokenizer.bos)[start]
    # The turn of a line is how many lines of its document were drawn before it.
    by_document = np.argsort(document, kind="stable")
    _, first, members = np.unique(
        document[by_document], return_index=True, return_counts=True
    )
    turn = np.empty_like(start)
    turn[by_document] = np.arange(start.size) - np.repeat(first, members)
    return [
        np.concatenate([[tokenizer.bos], tokens[a : a + passage]]).astype(np.int32)
        for a in start[np.argsort(turn, kind="stable")[:count]]
    ]


class _CopyWriter:
    """The one place that knows what a copy document looks like."""

    def __init__(self, tokenizer: Tokenizer):
        self._bos, self._eos = [tokenizer.bos], [tokenizer.eos]
        self._separator = tokenizer.encode(SEPARATOR)
        # A document's first line starts after its BOS.
        self._before_line = np.array(
            [
                token == tokenizer.bos or text.endswith(b"\n")
                for token, text in enumerate(tokenizer.token_bytes)
            ]
        )

    def length(self, passage: int) -> int:
        """Return the tokens of a copy document."""
        return 2 * passage + len(self._separator) + 2

    def write(self, passage: np.ndarray) -> np.ndarray:
        """Return BOS, passage, separator, passage, EOS."""
        parts = (self._bos, passage, self._separator, passage, self._eos)
        return np.concatenate(parts, dtype=passage.dtype, casting="unsafe")

    def passages(self, tokens: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where a line starts, and the tokens from there to its document's end.

        Only lines with `least` such tokens are returned.
        """
        starts = np.flatnonzero(self._before_line[tokens]) + 1
        ends = np.append(np.flatnonzero(tokens == self._eos[0]), tokens.size)
        room = ends[np.searchsorted(ends, starts)] - starts
        keep = room >= least
        return starts[keep], room[keep]


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
