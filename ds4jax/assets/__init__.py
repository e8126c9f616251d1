"""What ships: a small trained model, with its model card, and prompts to try it on."""

from pathlib import Path

from ds4jax.errors import FileError

PROMPTS = ("copy", "technical", "prose")
"""Kinds of text: one that repeats itself word for word, a manual, and a story."""


def _path(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.is_file():
        raise FileError(f"{path}: not installed, though it ships; name a file")
    return path


def trunk() -> Path:
    """Return the path of the shipped trunk.

    Raises:
      FileError: if this installation lacks it.
    """
    return _path("trunk.gguf")


def mtp() -> Path:
    """Return the path of the shipped MTP block.

    Raises:
      FileError: if this installation lacks it.
    """
    return _path("mtp.gguf")


def prompt(kind: str) -> Path:
    """Return the path of a text of one of PROMPTS, which the model was not trained on.

    Raises:
      FileError: if this installation lacks it.
    """
    return _path(f"prompts/{kind}.txt")
