"""From tensors as they are to be stored to a GGUF v3 file, with gguf-py's writer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, cast

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ds4jax.errors import ConfigError
from ds4jax.files import replacing
from ds4jax.gguf.architecture import ARCHITECTURE
from ds4jax.gguf.container import VALUE_DTYPES

_VALUE_TYPES = {dtype: kind for kind, dtype in VALUE_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class _InParts:
    """Stands where gguf-py writes an array, and never is in memory whole."""

    nbytes: int
    parts: Iterable[np.ndarray]

    def tofile(self, file: BinaryIO):
        for part in self.parts:
            part.tofile(file)


def write_stored(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    layout: Mapping[str, tuple[tuple[int, ...], str]],
    content: Callable[[str], Iterable[np.ndarray]],
    alignment: int = 32,
):
    """Write a file beside `path` and move it there, holding a part of it at a time.

    Args:
      path: file to write or replace.
      metadata: as of `gguf.write`.
      layout: shape and ggml type of every tensor, in file order.
      content: makes the bytes of the tensor of a name, in parts that follow each other
        in the file, when they are written.
      alignment: as of `gguf.write`.

    Raises:
      ConfigError: for metadata or an alignment that GGUF cannot hold.
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
        for key, value in metadata.items():
            if key not in ("general.architecture", "general.alignment"):
                writer.add_key_value(key, *_typed(f"{path}: metadata key {key}", value))
        sizes = {}
        for name, (shape, ggml_type) in layout.items():
            kind = GGMLQuantizationType[ggml_type]
            block, block_bytes = GGML_QUANT_SIZES[kind]
            sizes[name] = math.prod(shape) // block * block_bytes
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), sizes[name], raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, size in sizes.items():
            tensor = _InParts(size, content(name))
            writer.write_tensor_data(cast(np.ndarray, tensor))


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
