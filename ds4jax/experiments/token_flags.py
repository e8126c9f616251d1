"""What the commands that read token ids share: the flag, and how ids are spelled.

A command gets the flag with `flags.adopt_module_key_flags(token_flags)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ds4jax.decode import driver
from ds4jax.errors import FileError, TokenError

TOKENS = flags.DEFINE_string("tokens", None, "Token ids: 1,2,3 or @FILE of them.")


def read_ids() -> list[int]:
    """Return the ids that `--tokens` spells, at least one.

    Raises:
      FileError: if its file cannot be read.
      TokenError: for anything but ids, or for none.
    """
    words = TOKENS.value or ""
    if words.startswith("@"):
        words = read_text(words[1:])
    try:
        ids = [int(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        raise TokenError(f"--tokens: expected ids such as 1,2,3: {error}") from None
    if not ids:
        raise TokenError("--tokens: expected at least one id, found none")
    return ids


def check_ids(ids: Sequence[int], vocab: int):
    """Compare the ids of `--tokens` with the vocabulary.

    Raises:
      TokenError: for an id outside it.
    """
    driver.check_ids("--tokens", ids, vocab)


def read_text(path: str) -> str:
    """Return a file's text as it is, line ends included.

    Raises:
      FileError: if it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as text: {error}") from None
