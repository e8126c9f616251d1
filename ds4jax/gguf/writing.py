"""From named arrays to a GGUF v3 file: what type each is stored as, and its bytes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import ArrayLike

from ds4jax import quant, quantize, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError
from ds4jax.gguf.architecture import metadata as describe
from ds4jax.gguf.container import MAX_AXES, PLAIN_DTYPES
from ds4jax.gguf.loading import find_flaw
from ds4jax.gguf.storing import write_stored

WRITABLE_TYPES = ("F32", "F16", "BF16", "I32", *quantize.FORMATS, "MXFP4")
"""The ggml types that `write` encodes."""

_PART = 2**26
"""Weights of a stack that are encoded at once, in whole matrices."""

_LARGEST_SCALE = float(np.finfo(np.float16).max)
_LARGEST = {"Q8_0": 127, "Q2_K": 15 * 3, "Q4_K": 63 * 15, "IQ2_XXS": 43 * 15.5 / 4}
"""The largest magnitude of each format, in units of its float16 scale."""


def write_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, ArrayLike],
    plan: QuantPlan,
    extra_metadata: Mapping[str, Any] | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    progress: quantize.Progress | None = None,
):
    """Write a trunk, or an MTP block if `weights` are those of one.

    Args:
      path: file to write or replace.
      config: architecture; an MTP file does not repeat it.
      weights: float arrays (integers for hash tables) by the names of `schema.py`.
      plan: ggml type of each group; vectors are F32, hash tables I32.
      extra_metadata: further keys, such as the tokenizer's.
      importance, progress: as of `write`.

    Raises:
      ConfigError: if `weights` do not fit `config`, or as `write`.
      FileError: as `write`.
    """
    is_mtp = "mtp.0.norm.weight" in weights
    specs = schema.mtp(config) if is_mtp else schema.trunk(config)
    for name in specs | dict(weights):
        expected = specs[name].shape if name in specs else "no such tensor"
        found = np.shape(weights[name]) if name in weights else "no such tensor"
        if found != expected:
            raise ConfigError(f"{path}: {name}: expected {expected}, found {found}")
    write(
        path,
        ({} if is_mtp else describe(config)) | dict(extra_metadata or {}),
        {name: (weights[name], plan.types[spec.group]) for name, spec in specs.items()},
        importance=importance,
        progress=progress,
    )


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[ArrayLike, str]],
    *,
    name: str | None = None,
    alignment: int = 32,
    importance: Mapping[str, np.ndarray] | None = None,
    progress: quantize.Progress | None = None,
):
    """Write a GGUF v3 file beside `path` and move it there.

    Equal arguments give equal bytes.  Tensors are encoded one at a time and stacks of
    matrices in parts, so beside one tensor's values only a part's bytes are in memory.

    Args:
      path: file to write or replace.
      metadata: by key.  A numpy scalar or array keeps its dtype.  A Python int becomes
        u32 (i32 if negative, 64 bits if it needs them) and a float f32; in lists i32
        (or i64) and f32.
      tensors: by name the values, float or integer, and the ggml type to store.
      name: `general.name`.
      alignment: bytes between the starts of tensors are a multiple of it.
      importance: by name, for `quantize.quantize`: float32 [K], or [E, K] for a stack
        of E matrices.  Without it all columns of a tensor count the same.
      progress: told of values as they are encoded.

    Raises:
      ConfigError: for a type that cannot be encoded or does not fit the shape, values
        that are not finite or overflow the type, or metadata that GGUF cannot hold.
      FileError: if the file cannot be written.
    """
    path = pathlib.Path(path)
    for tensor_name, (values, ggml_type) in tensors.items():
        _check_type(f"{path}: tensor {tensor_name}", np.shape(values), ggml_type)

    def encode(tensor_name: str) -> Iterator[np.ndarray]:
        what = f"{path}: tensor {tensor_name}"
        values, ggml_type = tensors[tensor_name]
        values = np.asarray(values)
        weights = (importance or {}).get(tensor_name)
        if weights is not None:
            _check_importance(what, values.shape, weights)
        step = len(values)
        if values.ndim > 2:
            step = max(1, _PART // values[0].size)
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            each = weights if weights is None or weights.ndim == 1 else weights[part]
            yield _encode(what, values[part], ggml_type, each, progress)

    keys = ({} if name is None else {"general.name": name}) | dict(metadata)
    layout = {n: (np.shape(values), kind) for n, (values, kind) in tensors.items()}
    write_stored(path, keys, layout, encode, alignment)


def _check_type(what: str, shape: tuple[int, ...], ggml_type: str):
    if ggml_type not in WRITABLE_TYPES:
        raise ConfigError(
            f"{what}: type: expected one of {', '.join(WRITABLE_TYPES)}, found"
            f" {ggml_type!r}"
        )
    if not 1 <= len(shape) <= MAX_AXES or 0 in shape:
        raise ConfigError(
            f"{what}: expected 1 to {MAX_AXES} axes, none empty, found shape {shape}"
        )
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    if shape[-1] % block:
        raise ConfigError(
            f"{what}: {ggml_type} needs a last axis that is a multiple of {block},"
            f" found shape {shape}; store it as F16 or F32"
        )


def _check_importance(what: str, shape: tuple[int, ...], importance: np.ndarray):
    """Expect it of the columns, [K], or of those of each matrix of a stack, [E, K]."""
    width = shape[-1]
    if importance.shape not in ((width,), (*shape[:-2], width)):
        raise ConfigError(
            f"{what}: importance: expected it of each column of weights"
            f" {shape}, found {importance.shape}"
        )


def _encode(
    what: str,
    values: np.ndarray,
    ggml_type: str,
    importance: np.ndarray | None,
    progress: quantize.Progress | None,
) -> np.ndarray:
    """Return `values` as they lie in the file."""
    progress = progress or (lambda _: None)
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    if ggml_type == "I32":
        limits = np.iinfo(np.int32)
        if floating or values.min() < limits.min or values.max() > limits.max:
            raise ConfigError(f"{what}: expected integers of 32 bits for I32")
        progress(values.size)
        return values.astype(np.int32)
    if not floating:
        raise ConfigError(f"{what}: expected floats, found {values.dtype}")
    # Overflow shows as infinity, which is looked for below.
    with np.errstate(all="ignore"):
        values = np.ascontiguousarray(values, np.float32)
        if flaw := find_flaw(values):
            raise ConfigError(f"{what}: found {flaw}")
        if ggml_type == "MXFP4":
            # gguf-py wraps the exponent of a block below 2^-125, to 255 (NaN) at worst.
            values = np.where(np.abs(values) < 2.0**-125, np.float32(0), values)
        if ggml_type in quantize.FORMATS:
            raw = _quantize(what, values, ggml_type, importance, progress)
            largest = max(values.max(), -values.min())
            overflows = largest > _LARGEST[ggml_type] * _LARGEST_SCALE
        else:
            raw = gguf.quants.quantize(values, GGMLQuantizationType[ggml_type])
            plain = PLAIN_DTYPES.get(ggml_type)
            stored = quant.pack(ggml_type, raw) if plain is None else raw.view(plain)
            overflows = find_flaw(stored)
            progress(values.size)
    if overflows:
        raise ConfigError(
            f"{what}: its largest magnitude, {np.abs(values).max():g}, overflows"
            f" {ggml_type}; store it as F32"
        )
    return raw


def _quantize(
    what: str,
    values: np.ndarray,
    ggml_type: str,
    importance: np.ndarray | None,
    progress: quantize.Progress,
) -> np.ndarray:
    """Encode the last axis in blocks; each matrix of a stack has its importance."""
    rows = values.reshape(-1, values.shape[-1])
    try:
        raw = quantize.quantize(rows, ggml_type, importance, progress=progress)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    return raw.reshape(*values.shape[:-1], -1)
