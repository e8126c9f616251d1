"""From named arrays to a GGUF v3 file, with gguf-py's writer and encoders."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import ArrayLike

from ds4jax import quant, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError
from ds4jax.files import replacing
from ds4jax.gguf.architecture import ARCHITECTURE
from ds4jax.gguf.architecture import metadata as describe
from ds4jax.gguf.container import MAX_AXES, PLAIN_DTYPES, VALUE_DTYPES
from ds4jax.gguf.loading import find_flaw

WRITABLE_TYPES = ("F32", "F16", "BF16", "I32", "Q8_0", "MXFP4")
"""The ggml types that `write` encodes: those gguf-py has an encoder for."""

_VALUE_TYPES = {dtype: kind for kind, dtype in VALUE_DTYPES.items()}


def write_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, ArrayLike],
    plan: QuantPlan,
    extra_metadata: Mapping[str, Any] | None = None,
):
    """Write a trunk, or an MTP block if `weights` are those of one.

    Args:
      path: file to write or replace.
      config: architecture; an MTP file does not repeat it.
      weights: float arrays (integers for hash tables) by the names of `schema.py`.
      plan: ggml type of each group; vectors are F32, hash tables I32.
      extra_metadata: further keys, such as the tokenizer's.

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
    types = {**vars(plan), "vector": "F32", "table": "I32"}
    write(
        path,
        ({} if is_mtp else describe(config)) | dict(extra_metadata or {}),
        {name: (weights[name], types[spec.group]) for name, spec in specs.items()},
    )


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[ArrayLike, str]],
    *,
    name: str | None = None,
    alignment: int = 32,
):
    """Write a GGUF v3 file beside `path` and move it there.

    Equal arguments give equal bytes.  Tensors are encoded one at a time.

    Args:
      path: file to write or replace.
      metadata: by key.  A numpy scalar or array keeps its dtype.  A Python int becomes
        u32 (i32 if negative, 64 bits if it needs them) and a float f32; in lists i32
        (or i64) and f32.
      tensors: by name the values, float or integer, and the ggml type to store.
      name: `general.name`.
      alignment: bytes between the starts of tensors are a multiple of it.

    Raises:
      ConfigError: for a type that cannot be encoded or does not fit the shape, values
        that are not finite or overflow the type, or metadata that GGUF cannot hold.
      FileError: if the file cannot be written.
    """
    path = pathlib.Path(path)
    with (
        replacing(path) as part,
        contextlib.closing(gguf.GGUFWriter(part, ARCHITECTURE)) as writer,
    ):
        try:
            writer.add_custom_alignment(alignment)
        except ValueError as error:
            raise ConfigError(f"{path}: alignment {alignment}: {error}") from error
        keys = ({} if name is None else {"general.name": name}) | dict(metadata)
        for key, value in keys.items():
            if key not in ("general.architecture", "general.alignment"):
                writer.add_key_value(key, *_typed(f"{path}: metadata key {key}", value))
        for tensor_name, (values, ggml_type) in tensors.items():
            shape = np.shape(values)
            size = _stored_bytes(f"{path}: tensor {tensor_name}", shape, ggml_type)
            writer.add_tensor_info(
                tensor_name,
                shape,
                np.dtype(np.float32),
                size,
                raw_dtype=GGMLQuantizationType[ggml_type],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, (values, ggml_type) in tensors.items():
            what = f"{path}: tensor {tensor_name}"
            writer.write_tensor_data(_encode(what, np.asarray(values), ggml_type))


def _typed(what: str, value: Any) -> tuple[Any, ...]:
    """Return a metadata value, its GGUF type and, for a list, that of its items."""
    if isinstance(value, str):
        return value, GGUFValueType.STRING
    if isinstance(value, (list, tuple)) and value and _is_text(value):
        return value, GGUFValueType.ARRAY, GGUFValueType.STRING
    items = np.asarray(value)
    if not isinstance(value, (np.generic, np.ndarray)):
        items = _narrow(items)
    if items.dtype not in _VALUE_TYPES or items.ndim > 1 or items.size == 0:
        raise ConfigError(
            f"{what}: expected text, a number or a non-empty list of one of them, found"
            f" {reprlib.repr(value)}"
        )
    kind = _VALUE_TYPES[items.dtype]
    if items.ndim == 0:
        return items.item(), kind
    return items.tolist(), GGUFValueType.ARRAY, kind


def _is_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _narrow(items: np.ndarray) -> np.ndarray:
    """Give Python numbers the widths that ds4 insists on, where these hold them."""
    unsigned_first = [np.uint32] if items.ndim == 0 else []
    wanted = {"i": [*unsigned_first, np.int32], "f": [np.float32]}
    for dtype in wanted.get(items.dtype.kind, []):
        limits = np.finfo(dtype) if items.dtype.kind == "f" else np.iinfo(dtype)
        beyond = (items < limits.min) | (items > limits.max)
        if not (beyond & np.isfinite(items)).any():
            return items.astype(dtype)
    return items


def _stored_bytes(what: str, shape: tuple[int, ...], ggml_type: str) -> int:
    if ggml_type not in WRITABLE_TYPES:
        raise ConfigError(
            f"{what}: type: expected one of {', '.join(WRITABLE_TYPES)}, found"
            f" {ggml_type!r}"
        )
    if not 1 <= len(shape) <= MAX_AXES or 0 in shape:
        raise ConfigError(
            f"{what}: expected 1 to {MAX_AXES} axes, none empty, found shape {shape}"
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    if shape[-1] % block:
        raise ConfigError(
            f"{what}: {ggml_type} needs a last axis that is a multiple of {block},"
            f" found shape {shape}; store it as F16 or F32"
        )
    return math.prod(shape) // block * block_bytes


def _encode(what: str, values: np.ndarray, ggml_type: str) -> np.ndarray:
    """Return `values` as they lie in the file."""
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    if ggml_type == "I32":
        limits = np.iinfo(np.int32)
        if floating or values.min() < limits.min or values.max() > limits.max:
            raise ConfigError(f"{what}: expected integers of 32 bits for I32")
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
        raw = gguf.quants.quantize(values, GGMLQuantizationType[ggml_type])
    plain = PLAIN_DTYPES.get(ggml_type)
    stored = quant.pack(ggml_type, raw) if plain is None else raw.view(plain)
    if find_flaw(stored):
        raise ConfigError(
            f"{what}: its largest magnitude, {np.abs(values).max():g}, overflows"
            f" {ggml_type}; store it as F32"
        )
    return raw
