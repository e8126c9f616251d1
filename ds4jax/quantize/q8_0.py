"""Q8_0: blocks of 32 signed bytes under one scale, with gguf-py's own encoder."""

from __future__ import annotations

import gguf
import numpy as np

_LARGEST = 127 * float(np.finfo(np.float16).max)
# gguf-py divides by the block's scale, whose reciprocal is infinite further down.  A
# float16 scale is zero long before, so the decoded values are the same.
_SMALLEST = 2.0**-120


def encode(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return uint8 [blocks, 34] of float32 [blocks, 32]; `weights` do not matter.

    The bytes are gguf-py's (and ggml's), except where these would overflow.
    """
    del weights
    largest = np.abs(x).max(1, keepdims=True)
    x = np.where(largest < _SMALLEST, 0, np.clip(x, -_LARGEST, _LARGEST))
    # One row: gguf-py goes through a matrix by a few rows at a time.
    raw = gguf.quants.quantize(x.reshape(1, -1), gguf.GGMLQuantizationType.Q8_0)
    return raw.reshape(len(x), -1)
