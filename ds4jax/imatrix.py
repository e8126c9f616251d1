"""Importance matrices: how large the inputs of each column of a matrix are.

They are kept as llama.cpp's `llama-imatrix` writes them and its `llama-quantize` reads
them (ggml-org/llama.cpp `tools/imatrix/imatrix.cpp`, `common/imatrix-loader.cpp`): a
GGUF file with general.type "imatrix" and, for each weight, two F32 tensors

    NAME.in_sum2  [matrices, K]  sums of the squared inputs of each column
    NAME.counts   [matrices, 1]  how many rows each sum is of

with one matrix for a plain weight and one per expert for a stack of them.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from ds4jax import gguf
from ds4jax.errors import FileError

_SUMS, _COUNTS = ".in_sum2", ".counts"


class Sums(NamedTuple):
    """What is known of the inputs of one weight; numpy or JAX arrays.

    Attributes:
      squares: [matrices, K], the sum over rows of the squared input of each column.
      counts: [matrices], how many rows.
    """

    squares: Float[Array | np.ndarray, "matrices K"]
    counts: Float[Array | np.ndarray, "matrices"]


def write(
    path: str | os.PathLike[str],
    sums: Mapping[str, Sums],
    dataset: str,
    chunk_count: int,
    chunk_size: int,
):
    """Write an importance matrix.

    Args:
      path: file to write or replace.
      sums: by the names of weights in `schema.py`.
      dataset: what the inputs are of, such as the name of a text file.
      chunk_count: how many separate sequences that was.
      chunk_size: tokens of each.

    Raises:
      ConfigError: for sums that are not finite.
      FileError: if the file cannot be written.
    """
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [dataset],
        "imatrix.chunk_count": chunk_count,
        "imatrix.chunk_size": chunk_size,
    }
    tensors = {}
    for name in sorted(sums):
        squares, counts = map(np.asarray, sums[name])
        tensors[name + _SUMS] = squares, "F32"
        tensors[name + _COUNTS] = counts[:, None], "F32"
    gguf.write(path, metadata, tensors)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the mean squared input of each column, by the weight's name.

    Returns:
      float32 [K], or [matrices, K] of a weight with several.  A matrix that had no rows
      (an expert never chosen) gets the mean of the others, or ones if none had any.

    Raises:
      FileError: if it is not an importance matrix, or a malformed one.
    """
    file = gguf.read(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FileError(
            f"{path}: not an importance matrix in GGUF: general.type: expected"
            f" 'imatrix', found {reprlib.repr(kind)}"
        )
    # Tensors of other endings are other statistics, which llama.cpp skips too.
    names = {
        tensor.removesuffix(ending)
        for tensor in file.tensors
        for ending in (_SUMS, _COUNTS)
        if tensor.endswith(ending)
    }
    if not names:
        raise FileError(f"{path}: expected tensors NAME{_SUMS}, found none")
    return {name: _means(file, name) for name in sorted(names)}


def _means(file: gguf.GGUF, name: str) -> np.ndarray:
    squares = _numbers(file, name + _SUMS)
    counts = _numbers(file, name + _COUNTS)
    if counts.shape != (len(squares), 1):
        raise FileError(
            f"{file.path}: tensor {name}{_COUNTS}: expected shape {(len(squares), 1)},"
            f" as {name}{_SUMS} has {squares.shape}, found {counts.shape}"
        )
    known = counts[:, 0] > 0
    means = np.ones_like(squares)
    means[known] = squares[known] / counts[known]
    if known.any():
        means[~known] = means[known].mean(axis=0)
    means = means.astype(np.float32)
    return means[0] if len(means) == 1 else means


def _numbers(file: gguf.GGUF, name: str) -> np.ndarray:
    """Return a tensor as float64 [matrices, columns]; a vector is of one matrix."""
    if name not in file.tensors:
        raise FileError(f"{file.path}: tensor {name} is missing")
    found = file.tensors[name]
    if found.type != "F32" or len(found.shape) > 2:
        raise FileError(
            f"{file.path}: tensor {name}: expected F32 of two axes, found {found.type}"
            f" of shape {found.shape}"
        )
    if not (np.isfinite(found.data) & (found.data >= 0)).all():
        raise FileError(
            f"{file.path}: tensor {name}: expected finite numbers of at least 0"
        )
    return np.atleast_2d(found.data).astype(np.float64)
