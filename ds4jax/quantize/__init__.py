"""Encoders of the block formats: Q8_0, Q2_K, Q4_K and IQ2_XXS.

They write what `ds4jax.quant` and gguf-py read, and choose what the formats leave open
(scales, minima, grid rows) to lower the mean squared error of a row, or the error of
its product with activations where an importance vector says how large these are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import cast

import joblib
import numpy as np

from ds4jax.errors import ConfigError, expect
from ds4jax.quantize import iq2_xxs, k_quants, q8_0

__all__ = ["FORMATS", "Progress", "quantize"]

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]

Progress = Callable[[int], object]
"""Told, now and then, how many more weights are done."""


@dataclasses.dataclass(frozen=True)
class _Format:
    """How `encode` turns [blocks, block] weights and importances into bytes.

    `chunk` blocks are encoded at once: few enough for their temporaries to stay in a
    core's cache, many enough for the time between numpy's loops not to count.
    """

    block: int
    block_bytes: int
    chunk: int
    encode: Encode


_FORMATS = {
    "Q8_0": _Format(32, 34, 2048, q8_0.encode),
    "Q2_K": _Format(256, 84, 512, k_quants.encode_q2_k),
    "Q4_K": _Format(256, 144, 512, k_quants.encode_q4_k),
    "IQ2_XXS": _Format(256, 66, 64, iq2_xxs.encode),
}

FORMATS = tuple(_FORMATS)
"""The ggml types that `quantize` encodes."""

_LEAST_IMPORTANCE = 1e-3
"""Of the block's mean: what a column that was never active counts."""

_TASK = 2**18
"""Weights that a process encodes before it asks for more."""


def quantize(
    x: np.ndarray,
    format: str,
    importance: np.ndarray | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Encode a matrix in a block format.

    The bytes of a block depend on that block and its importances alone, so they are
    the same for any number of workers and for any split of the rows.  A scale that
    float16 cannot hold is clamped to its range: the values saturate, and no scale is
    infinite or NaN.

    Args:
      x: float32 [rows, K], finite; copied whole unless it is C-contiguous.
      format: one of `FORMATS`.
      importance: float32 [K], the mean squared activation of each input column (an
        imatrix row), or [M, K] if the rows are those of M matrices, one after the
        other; None for equal columns.  Only ratios within a block matter; a block of
        zeros counts as equal columns.  Q8_0 ignores it.
      workers: how many processes encode a large matrix; by default one per CPU.  (Of
        threads, numpy lets hardly more than one run.)
      progress: told of weights as they are encoded.

    Returns:
      uint8 [rows, bytes of a row], the blocks as ggml stores them.

    Raises:
      ConfigError: for an unknown format, a matrix or importance of another dtype or
        shape or with values that are not finite, a negative importance, or K that is
        not whole blocks; for workers below 1.
    """
    if format not in _FORMATS:
        raise ConfigError(
            f"format: expected one of {', '.join(FORMATS)}, found {format!r}"
        )
    layout = _FORMATS[format]
    if x.dtype != np.float32 or x.ndim != 2:
        raise ConfigError(
            f"{format}: expected a float32 matrix, found {x.dtype} of shape {x.shape}"
        )
    rows, columns = x.shape
    if columns % layout.block:
        raise ConfigError(
            f"{format}: expected rows of a multiple of {layout.block} weights,"
            f" found {columns}"
        )
    workers = joblib.cpu_count() if workers is None else workers
    expect("workers", workers >= 1, "at least 1", workers)
    equal = np.ones(columns, np.float32)
    weights = _weights(
        equal if importance is None else importance, rows, columns, layout.block
    )
    blocks = x.reshape(-1, layout.block)
    of_row = columns // layout.block
    step = _TASK // layout.block
    starts = range(0, len(blocks), step)

    for start in starts:
        part = blocks[start : start + step]
        if not np.isfinite(part).all():
            first = int(np.argmin(np.isfinite(part)))
            row, column = divmod(start * layout.block + first, columns)
            raise ConfigError(
                f"{format}: expected finite weights, found {x[row, column]} at row"
                f" {row}, column {column}"
            )

    def task(start: int) -> tuple[str, np.ndarray, np.ndarray]:
        part = blocks[start : start + step]
        at = np.arange(start, start + len(part))
        return format, part, weights[at * len(weights) // len(blocks), at % of_row]

    run = joblib.Parallel(
        n_jobs=max(1, min(workers, len(starts))),
        return_as="generator",
        pre_dispatch="2*n_jobs",
        batch_size=1,  # pyright: ignore[reportArgumentType]
        max_nbytes=None,  # to a worker through its pipe, with no file in between
    )
    raw = np.empty((len(blocks), layout.block_bytes), np.uint8)
    found = run(joblib.delayed(_encode)(*task(start)) for start in starts)
    found = cast(Iterator[np.ndarray], found)
    for start, part in zip(starts, found, strict=True):
        raw[start : start + step] = part
        if progress:
            progress(len(part) * layout.block)
    return raw.reshape(rows, of_row * layout.block_bytes)


def _encode(format: str, blocks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the bytes of blocks, uint8 [blocks, bytes of a block]."""
    layout = _FORMATS[format]
    return np.concatenate(
        [
            layout.encode(
                blocks[at : at + layout.chunk], weights[at : at + layout.chunk]
            )
            for at in range(0, len(blocks), layout.chunk)
        ]
    )


def _weights(importance: np.ndarray, rows: int, columns: int, block: int) -> np.ndarray:
    """Return the float32 weights of squared errors, [M, blocks of a row, block]."""
    matrices = importance.shape[0] if importance.ndim == 2 else 1
    if (
        importance.dtype != np.float32
        or importance.shape not in ((columns,), (matrices, columns))
        or not matrices
        or rows % matrices
    ):
        raise ConfigError(
            f"importance: expected float32 of shape ({columns},), or (M, {columns}) for"
            f" M matrices in {rows} rows, found {importance.dtype} of shape"
            f" {importance.shape}"
        )
    wrong = ~(np.isfinite(importance) & (importance >= 0))
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise ConfigError(
            "importance: expected finite numbers of at least 0, found"
            f" {importance[tuple(at)]} at column {at[-1]}"
        )
    # float64, whose range no sum of float32 leaves.
    wide = importance.reshape(matrices, -1, block).astype(np.float64)
    mean = wide.mean(-1, keepdims=True)
    relative = wide / np.where(mean > 0, mean, 1)
    floored = np.where(mean > 0, np.maximum(relative, _LEAST_IMPORTANCE), 1)
    return floored.astype(np.float32)
