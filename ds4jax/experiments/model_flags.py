"""What the commands that run a model share: its files.

A command gets the flags with `flags.adopt_module_key_flags(model_flags)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from ds4jax import assets, gguf
from ds4jax.errors import CapacityError, ConfigError, FileError
from ds4jax.model import deepseek
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

_GGUF = flags.DEFINE_string("gguf", None, "Trunk file; the shipped one by default.")
_MTP = flags.DEFINE_string(
    "mtp", None, "MTP file; the shipped one by default, if the trunk is."
)


def trunk_path() -> Path:
    """Return the trunk's file.

    Raises:
      FileError: if none is named and none is installed.
    """
    return Path(_GGUF.value) if _GGUF.value else assets.trunk()


def mtp_path() -> Path | None:
    """Return the MTP block's file, or None for a trunk alone.

    Raises:
      FileError: as `trunk_path`.
    """
    if _MTP.value:
        return Path(_MTP.value)
    return None if _GGUF.value else assets.mtp()


def are_given() -> bool:
    """Say whether a file is named, rather than the shipped ones meant."""
    return _GGUF.value is not None or _MTP.value is not None


def load(**changes) -> Model:
    """Return the model of the flags, on the default device.

    Args:
      **changes: fields of its config that are to differ from the file's.

    Raises:
      FileError: as `gguf.load_trunk` and `gguf.load_mtp`.
      ConfigError: as they, or if the changes do not suit the model.
    """
    config, trunk = gguf.load_trunk(trunk_path(), deepseek.place)
    config = dataclasses.replace(config, **changes)
    mtp = mtp_path()
    head = gguf.load_mtp(mtp, config, deepseek.place) if mtp else None
    return deepseek.build(config, trunk, head)


def load_tokenizer() -> Tokenizer | None:
    """Return the vocabulary of the trunk's file, or None if it has none.

    Raises:
      FileError: if the file cannot be read, or its vocabulary is not one of ds4's.
    """
    path = trunk_path()
    metadata = gguf.read(path).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    try:
        return Tokenizer.from_metadata(metadata)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from error


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Tell it in one line if the model or its text is too large.

    Raises:
      CapacityError: if the block runs out of memory, on the host or on the device.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise CapacityError(
            f"out of memory; expected a smaller model or fewer tokens: {reason}"
        ) from error
