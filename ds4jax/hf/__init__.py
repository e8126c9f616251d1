"""Hugging Face checkpoints of DeepSeek-V4: `config.json`, safetensors, vocabulary.

`load` turns a directory into a `ModelConfig` and the tensors of `schema.py` under their
GGUF names; `config` and `named` are its halves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ds4jax.config import ModelConfig
from ds4jax.hf.architecture import config
from ds4jax.hf.checkpoint import tensors
from ds4jax.hf.vocabulary import vocabulary
from ds4jax.hf.weights import named

__all__ = ["config", "load", "named", "vocabulary"]


def load(
    directory: str | os.PathLike[str],
) -> tuple[ModelConfig, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Return (config, trunk, mtp) of a checkpoint; mtp is empty if it has none.

    Every name, type and shape is checked here; values are read from the memory map
    when a tensor is asked for, as float32 (the routing tables as int32).

    Raises:
      ConfigError: for a key of `config.json` that is missing or not supported.
      FileError: for a file or tensor that is missing, malformed or surplus.
    """
    root = Path(directory)
    architecture = config(root / "config.json")
    return architecture, *named(architecture, tensors(root), str(root))
