"""Write ds4's GGUF files from a Hugging Face checkpoint of DeepSeek-V4.

    ds4jax convert --hf=DIR --out=trunk.gguf --mtp_out=mtp.gguf

DIR holds config.json, safetensors files (official or transformers' names; FP8 and FP4
storage is dequantised first) and, for text, tokenizer.json.  Tensors are converted one
at a time, and both files appear when both are complete.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, hf, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError, FileError
from ds4jax.files import check_place, replacing
from ds4jax.tokenizer import Tokenizer

_HF = flags.DEFINE_string("hf", None, "Directory of the checkpoint.", required=True)
_OUT = flags.DEFINE_string("out", None, "Trunk file to write.", required=True)
_MTP_OUT = flags.DEFINE_string(
    "mtp_out", None, "File to write for the MTP block; without it none is written."
)
_TYPES = flags.DEFINE_enum(
    "types",
    "q8_0",
    ["f32", "f16", "q8_0"],
    "Type of the matrices; with q8_0 the embedding, routers, compressors, indexers and"
    " hyper-connections are f16, as in ds4's own files.",
)


class _Deferred:
    """A tensor that is assembled when the writer encodes it, and then forgotten."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        name: str,
        shape: tuple[int, ...],
        bar: tqdm,
    ):
        self.shape = shape
        self._weights = weights
        self._name = name
        self._bar = bar

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = self._weights[self._name]
        self._bar.update()
        return values


def main(argv: Sequence[str]):
    """Convert the checkpoint that the flags name.

    Raises:
      ConfigError, FileError: as `hf.load`, `hf.vocabulary` and `gguf.write_model`; if
        `--mtp_out` is given for a checkpoint without an MTP block.
    """
    del argv
    source, out = Path(_HF.value), Path(_OUT.value)
    config, trunk, mtp = hf.load(source)
    jobs = [(out, trunk, schema.trunk(config), _vocabulary(source, config))]
    if _MTP_OUT.value is not None:
        mtp_out = Path(_MTP_OUT.value)
        if not mtp:
            raise ConfigError(
                f"--mtp_out={mtp_out}: {source} has no MTP block; leave the flag out"
            )
        if mtp_out.resolve() == out.resolve():
            raise ConfigError(f"--mtp_out={mtp_out}: expected another file than --out")
        jobs.append((mtp_out, mtp, schema.mtp(config), {}))
    elif mtp:
        _note(f"the MTP block of {source} is left out; --mtp_out=FILE writes it")
    plan = QuantPlan.named(_TYPES.value)
    total = sum(len(weights) for _, weights, _, _ in jobs)
    for path, *_ in jobs:
        check_place(path)
    with contextlib.ExitStack() as stack:
        # Each is moved into place as the stack unwinds, if all are written.
        parts = [stack.enter_context(replacing(path)) for path, *_ in jobs]
        with tqdm(total=total, unit="tensor", disable=None) as bar:
            for part, (_, weights, specs, metadata) in zip(parts, jobs, strict=True):
                deferred: dict[str, Any] = {
                    name: _Deferred(weights, name, specs[name].shape, bar)
                    for name in weights
                }
                gguf.write_model(part, config, deferred, plan, metadata)
    for path, weights, _, _ in jobs:
        print(f"{path}: {len(weights)} tensors, {path.stat().st_size:,} bytes")


def _vocabulary(source: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the tokenizer's metadata, or none with a note if DIR has no tokenizer."""
    found = hf.vocabulary(source, config.vocab)
    if found is None:
        _note(f"no tokenizer.json in {source}: the model will take token ids, not text")
        return {}
    try:
        return Tokenizer(*found).metadata()
    except ConfigError as error:
        raise FileError(f"{source / 'tokenizer.json'}: {error}") from error


def _note(text: str):
    print(f"ds4jax convert: {text}", file=sys.stderr)
