"""Encoders of the block formats: Q8_0, Q2_K, Q4_K and IQ2_XXS.

They write what `ds4jax.quant` and gguf-py read, and choose what the formats leave open
(scales, minima, grid rows) to lower the mean squared error of a row, or the error of
its product with activations where an importance vector says how large these are.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from ds4jax.errors import ConfigError
from ds4jax.quantize import iq2_xxs, k_quants, q8_0

__all__ = ["FORMATS", "quantize"]

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Format:
    """How `encode` turns [blocks, block] weights and importances into bytes.

    `chunk` blocks are encoded at once: few enough for their temporaries to stay in a
    core's cache, many enough for the time between numpy's loops, when only one thread
    can run, not to count.
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


def quantize(
    x: np.ndarray,
    format: str,
    importance: np.ndarray | None = None,
    *,
    threads: int | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Encode a matrix in a block format.

    The bytes of a block depend on that block and its importances alone, so they are
    the same for any number of threads and for any split of the rows.  A scale that
    float16 cannot hold is clamped to its range: the values saturate, and no scale is
    infinite or NaN.

    Args:
      x: float32 [rows, K], finite; copied whole unless it is C-contiguous.
      format: one of `FORMATS`.
      importance: float32 [K], the mean squared activation of each input column (an
        imatrix row), or None for equal columns.  Only ratios within a block matter; a
        block of zeros counts as equal columns.  Q8_0 ignores it.
      threads: how many encode at once; by default one per CPU.
      progress: what to call this work in a progress bar; None for no bar.

    Returns:
      uint8 [rows, bytes of a row], the blocks as ggml stores them.

    Raises:
      ConfigError: for an unknown format, a matrix or importance of another dtype or
        shape or with values that are not finite, a negative importance, or K that is
        not whole blocks; for threads below 1.
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
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, found {threads}")
    weights = _weights(importance, columns, layout.block)
    blocks = x.reshape(-1, layout.block)
    raw = np.empty((len(blocks), layout.block_bytes), np.uint8)

    def encode(start: int) -> int:
        part = blocks[start : start + layout.chunk]
        if not np.isfinite(part).all():
            first = np.argmin(np.isfinite(part))
            row, column = divmod(start * layout.block + int(first), columns)
            raise ConfigError(
                f"{format}: expected finite weights, found {x[row, column]} at row"
                f" {row}, column {column}"
            )
        numbers = np.arange(start, start + len(part)) % len(weights)
        raw[start : start + len(part)] = layout.encode(part, weights[numbers])
        return len(part)

    # An error or Ctrl-C surfaces inside `map`, which then cancels what has not begun.
    with (
        tqdm(
            total=len(blocks) * layout.block,
            desc=progress,
            unit="weight",
            unit_scale=True,
            disable=True if progress is None else None,
        ) as bar,
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
    ):
        for done in pool.map(encode, range(0, len(blocks), layout.chunk)):
            bar.update(done * layout.block)
    return raw.reshape(rows, columns // layout.block * layout.block_bytes)


def _weights(importance: np.ndarray | None, columns: int, block: int) -> np.ndarray:
    """Return the float32 weights of squared errors, [blocks of a row, block]."""
    if importance is None:
        return np.ones((1, block), np.float32)
    if importance.dtype != np.float32 or importance.shape != (columns,):
        raise ConfigError(
            f"importance: expected float32 of shape ({columns},), found"
            f" {importance.dtype} of shape {importance.shape}"
        )
    wrong = ~(np.isfinite(importance) & (importance >= 0))
    if wrong.any():
        column = int(np.argmax(wrong))
        raise ConfigError(
            "importance: expected finite numbers of at least 0, found"
            f" {importance[column]} at column {column}"
        )
    # float64, whose range no sum of float32 leaves.
    wide = importance.reshape(-1, block).astype(np.float64)
    mean = wide.mean(-1, keepdims=True)
    relative = wide / np.where(mean > 0, mean, 1)
    floored = np.where(mean > 0, np.maximum(relative, _LEAST_IMPORTANCE), 1)
    return floored.astype(np.float32)
