"""The container: a GGUF v3 file as metadata and memory-mapped tensors.

gguf-py's `GGUFReader` is made for files that are known to be good: a corrupt array
length keeps it looping for hours, slices past the end come back short, and its view per
string takes ten seconds and half a gigabyte on Flash's vocabulary.  Guarding it means
walking the header first, and that walk is all a reader has to do.  Types, sizes and
encoders still are gguf-py's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import stat
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ds4jax.errors import FileError

MAX_COUNT = 2**24
"""Most items of a list and bytes of a text: a hundred times any real header's, and
small enough that a corrupt count costs seconds, not hours."""

MAX_NAME = 1024
"""Most bytes of a key or a tensor name, so that an error naming one stays a line."""

MAX_AXES = 4  # GGML_MAX_DIMS

PLAIN_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""The ggml types that are plain arrays; all others are blocks of bytes."""

VALUE_DTYPES = {
    GGUFValueType.UINT8: np.dtype(np.uint8),
    GGUFValueType.INT8: np.dtype(np.int8),
    GGUFValueType.UINT16: np.dtype(np.uint16),
    GGUFValueType.INT16: np.dtype(np.int16),
    GGUFValueType.UINT32: np.dtype(np.uint32),
    GGUFValueType.INT32: np.dtype(np.int32),
    GGUFValueType.UINT64: np.dtype(np.uint64),
    GGUFValueType.INT64: np.dtype(np.int64),
    GGUFValueType.FLOAT32: np.dtype(np.float32),
    GGUFValueType.FLOAT64: np.dtype(np.float64),
    GGUFValueType.BOOL: np.dtype(np.bool_),
}
"""The metadata types that have one number per value."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      type: ggml type name.
      shape: numpy order, slowest axis first.
      data: read-only view of the file: `[*shape]` of the type's own dtype if it is
        plain, else uint8 `[*shape[:-1], bytes of a row]`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file."""
        return self.data.nbytes


@dataclasses.dataclass(frozen=True)
class GGUF:
    """A file's content; the tensors keep it mapped.

    Attributes:
      metadata: scalars as Python values, lists of numbers as read-only numpy arrays of
        their own dtype, lists of strings as lists.
      tensors: by name, in file order.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | os.PathLike[str]) -> GGUF:
    """Map a GGUF v3 file and check its header against its size.

    Raises:
      FileError: if it is not there, not GGUF v3, truncated or malformed.
    """
    path = pathlib.Path(path)
    buffer = _map(path)
    cursor = _Cursor(path, buffer)
    if bytes(buffer[:4]) != b"GGUF":
        raise FileError(
            f"{path}: not a GGUF file: it starts with {bytes(buffer[:4])!r}"
        )
    cursor.take(4, "magic")
    version = cursor.integer("<I", "version")
    if version == 3 << 24:
        raise FileError(f"{path}: big-endian GGUF; only little-endian can be read")
    if version != 3:
        raise FileError(f"{path}: GGUF version {version}; only version 3 can be read")
    tensor_count = cursor.count("tensor count")
    key_count = cursor.count("metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a metadata key", MAX_NAME)
        if key in metadata:
            raise FileError(f"{path}: metadata key {key!r} is there twice")
        metadata[key] = cursor.value(key)
    records: dict[str, _Record] = {}
    for _ in range(tensor_count):
        name = cursor.text("a tensor name", MAX_NAME)
        if name in records:
            raise FileError(f"{path}: tensor {name!r} is there twice")
        records[name] = cursor.record(name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment.bit_count() != 1:
        found = alignment if type(alignment) is int else type(alignment).__name__
        raise FileError(
            f"{path}: general.alignment: expected a power of two, found {found}"
        )
    start = -(-cursor.offset // alignment) * alignment
    _check_extents(path, records, start, alignment, len(buffer))
    tensors = {
        name: _tensor(name, record, buffer[start + record.offset :])
        for name, record in records.items()
    }
    return GGUF(path, metadata, tensors)


def _map(path: pathlib.Path) -> np.ndarray:
    """Return the file's bytes as a read-only uint8 array over its memory map."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path}: not a regular file; a GGUF file is expected")
        if status.st_size == 0:
            raise FileError(f"{path}: the file is empty; a GGUF file is expected")
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Record:
    """A tensor as the header describes it; `offset` is from the start of the data."""

    type: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize


class _Cursor:
    """Reads the header front to back and never past the end of the file."""

    def __init__(self, path: pathlib.Path, buffer: np.ndarray):
        self.path = path
        self.buffer = buffer.data
        self.offset = 0

    def take(self, size: int, what: str) -> memoryview:
        end = self.offset + size
        if end > len(self.buffer):
            raise FileError(
                f"{self.path}: truncated: {what} needs {size} bytes at byte"
                f" {self.offset}, the file has {len(self.buffer)}"
            )
        taken = self.buffer[self.offset : end]
        self.offset = end
        return taken

    def integer(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, limit: int = MAX_COUNT) -> int:
        count = self.integer("<Q", what)
        if count > limit:
            raise FileError(
                f"{self.path}: {what}: expected at most {limit}, found {count}"
            )
        return count

    def text(self, what: str, limit: int = MAX_COUNT) -> str:
        raw = self.take(self.count(f"length of {what}", limit), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise FileError(
                f"{self.path}: {what} before byte {self.offset} is not UTF-8"
            ) from error

    def value(self, key: str) -> Any:
        what = f"metadata key {key!r}"
        kind = self.kind(what)
        if kind is not GGUFValueType.ARRAY:
            if kind is GGUFValueType.STRING:
                return self.text(what)
            return self.numbers(kind, 1, what)[0].item()
        kind, count = self.kind(what), self.count(f"items of {what}")
        if kind is GGUFValueType.STRING:
            return [self.text(what) for _ in range(count)]
        return self.numbers(kind, count, what)

    def kind(self, what: str) -> GGUFValueType:
        number = self.integer("<I", what)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise FileError(f"{self.path}: {what} has unknown type {number}") from error

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        if kind not in VALUE_DTYPES:
            raise FileError(f"{self.path}: {what} is a list of lists")
        dtype = VALUE_DTYPES[kind]
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def record(self, name: str) -> _Record:
        what = f"tensor {name!r}"
        axes = self.integer("<I", what)
        if not 1 <= axes <= MAX_AXES:
            raise FileError(
                f"{self.path}: {what}: expected 1 to {MAX_AXES} axes, found {axes}"
            )
        shape = tuple(self.integer("<Q", what) for _ in range(axes))[::-1]
        number = self.integer("<I", what)
        try:
            ggml_type = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError) as error:
            raise FileError(f"{self.path}: {what} has unknown type {number}") from error
        if 0 in shape:
            raise FileError(f"{self.path}: {what} is empty: its shape is {shape}")
        if shape[-1] % block:
            raise FileError(
                f"{self.path}: {what}: {ggml_type.name} rows are multiples of {block}"
                f" values, found shape {shape}"
            )
        dtype = PLAIN_DTYPES.get(ggml_type.name, np.dtype(np.uint8))
        row = shape[-1] // block * block_bytes // dtype.itemsize
        offset = self.integer("<Q", what)
        return _Record(ggml_type.name, shape, (*shape[:-1], row), dtype, offset)


def _check_extents(
    path: pathlib.Path,
    records: dict[str, _Record],
    start: int,
    alignment: int,
    size: int,
):
    """Check that tensors lie aligned, inside the file and beside one another."""
    end, before = 0, ""
    for name, record in sorted(records.items(), key=lambda item: item[1].offset):
        if record.offset % alignment:
            raise FileError(
                f"{path}: tensor {name!r}: offset {record.offset} is not a multiple of"
                f" general.alignment = {alignment}"
            )
        if start + record.offset + record.nbytes > size:
            raise FileError(
                f"{path}: tensor {name!r} points outside the file: it ends at byte"
                f" {start + record.offset + record.nbytes}, the file has {size}"
            )
        if record.offset < end:
            raise FileError(f"{path}: tensors {before!r} and {name!r} overlap")
        end, before = record.offset + record.nbytes, name


def _tensor(name: str, record: _Record, data: np.ndarray) -> Tensor:
    view = data[: record.nbytes].view(record.dtype).reshape(record.stored_shape)
    return Tensor(name, record.type, record.shape, view)
