"""Write ds4's GGUF files, from a Hugging Face checkpoint of DeepSeek-V4 or from others.

    ds4jax convert --hf=DIR --plan=ds4-q2 --out=trunk.gguf --mtp_out=mtp.gguf
    ds4jax convert --gguf=f32.gguf --plan=ds4-q4 --imatrix=imatrix.gguf --out=q4.gguf

DIR holds config.json, safetensors files (official or transformers' names; FP8 and FP4
storage is dequantised first) and, for text, tokenizer.json.  Tensors are converted one
at a time, and both files appear when both are complete.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, hf, imatrix, quant, schema
from ds4jax.config import PLANS, ModelConfig, QuantPlan, mtp_plan
from ds4jax.errors import ConfigError, FileError
from ds4jax.experiments import model_flags, pair_flags
from ds4jax.tokenizer import Tokenizer

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(pair_flags)
flags.mark_flag_as_required("out")
_HF = flags.DEFINE_string(
    "hf", None, "Directory of a checkpoint to convert, in place of --gguf and --mtp."
)
_PLAN = flags.DEFINE_enum(
    "plan",
    "q8_0",
    list(PLANS),
    "Types of the matrices. With q8_0 and ds4's own layouts, ds4-q2 and ds4-q4, the"
    " embedding, routers, compressors, indexers and hyper-connections are f16; with the"
    " latter the MTP block is mtp-q4.",
)
flags.DEFINE_alias("types", "plan")
_IMATRIX = flags.DEFINE_string(
    "imatrix", None, "File of `ds4jax imatrix`: which columns of a matrix matter."
)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is converted; `mtp` is empty if there is no MTP block."""

    name: str
    config: ModelConfig
    trunk: Mapping[str, np.ndarray]
    mtp: Mapping[str, np.ndarray]
    metadata: dict[str, Any]


class _Dequantised(Mapping[str, np.ndarray]):
    """A GGUF file's tensors in float32 (tables: int32), each made when asked for."""

    def __init__(self, path: Path):
        self._tensors = gguf.read(path).tensors

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._tensors[name]
        if found.type not in quant.FORMATS:
            keep = found.type == "I32"
            return found.data if keep else found.data.astype(np.float32)
        # A stack of experts one by one: whole, its planes and what is computed on the
        # way to the values would be in memory beside them.
        stack = found.data.reshape(-1, *found.data.shape[-2:])
        values = np.empty((len(stack), *found.shape[-2:]), np.float32)
        for i, raw in enumerate(stack):
            values[i] = quant.dequantize(quant.pack(found.type, raw))
        return values.reshape(found.shape)

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Deferred:
    """A tensor that is assembled when the writer encodes it, and then forgotten."""

    def __init__(
        self, weights: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]
    ):
        self.shape = shape
        self._weights = weights
        self._name = name

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._weights[self._name]


def main(argv: Sequence[str]):
    """Convert what the flags name.

    Raises:
      ConfigError, FileError: as the readers of the source, `imatrix.read` and
        `gguf.write_model`; for flags that do not go together, or `--mtp_out` where
        there is no MTP block.
    """
    del argv
    out, mtp_out = pair_flags.out(), pair_flags.mtp_out()
    source = _read_source()
    plan = _PLAN.value
    jobs = [(out, source.trunk, schema.trunk(source.config), plan, source.metadata)]
    if mtp_out is not None:
        if not source.mtp:
            raise ConfigError(
                f"--mtp_out={mtp_out}: {source.name} has no MTP block; leave the flag"
                " out"
            )
        specs = schema.mtp(source.config)
        jobs.append((mtp_out, source.mtp, specs, mtp_plan(plan), {}))
    elif source.mtp:
        _note(f"the MTP block of {source.name} is left out; --mtp_out=FILE writes it")
    importance = _read_importance([specs for _, _, specs, _, _ in jobs])
    total = sum(spec.size for _, _, specs, _, _ in jobs for spec in specs.values())
    with (
        pair_flags.writing([path for path, *_ in jobs]) as parts,
        tqdm(total=total, unit="weight", unit_scale=True, disable=None) as bar,
    ):
        for part, (_, weights, specs, plan, extra) in zip(parts, jobs, strict=True):
            deferred: dict[str, Any] = {
                name: _Deferred(weights, name, specs[name].shape) for name in weights
            }
            types = QuantPlan.named(plan)
            gguf.write_model(
                part, source.config, deferred, types, extra, importance, bar.update
            )
    for path, weights, *_ in jobs:
        print(f"{path}: {len(weights)} tensors, {path.stat().st_size:,} bytes")


def _read_source() -> _Source:
    if _HF.value is not None:
        if model_flags.are_given():
            raise ConfigError(
                "--hf: expected a checkpoint alone, found --gguf or --mtp too"
            )
        root = Path(_HF.value)
        config, trunk, mtp = hf.load(root)
        return _Source(_HF.value, config, trunk, mtp, _vocabulary(root, config))
    path, mtp_path = model_flags.trunk_path(), model_flags.mtp_path()
    check = lambda weight: None  # noqa: E731
    config, _ = gguf.load_trunk(path, check)
    mtp = {}
    if mtp_path is not None:
        gguf.load_mtp(mtp_path, config, check)
        mtp = _Dequantised(mtp_path)
    keys = gguf.read(path).metadata
    kept = {k: v for k, v in keys.items() if k.startswith(("tokenizer.", "general."))}
    return _Source(str(path), config, _Dequantised(path), mtp, kept)


def _read_importance(
    jobs: Sequence[Mapping[str, schema.TensorSpec]],
) -> dict[str, np.ndarray]:
    """Return the importances by tensor; a file of another model is refused."""
    if _IMATRIX.value is None:
        return {}
    found = imatrix.read(_IMATRIX.value)
    specs = {name: spec for job in jobs for name, spec in job.items()}
    known = found.keys() & specs.keys()
    if not known:
        raise ConfigError(
            f"--imatrix={_IMATRIX.value}: expected importances of this model's"
            " matrices, found none"
        )
    for name in sorted(known):
        *experts, _, width = specs[name].shape
        expected = (*experts, width)
        # What is known of a single matrix has no axis for it.
        if found[name].shape != expected and (1, *found[name].shape) != expected:
            raise ConfigError(
                f"--imatrix={_IMATRIX.value}: {name}: expected {expected}, found"
                f" {found[name].shape}; it is of another model"
            )
    return found


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
