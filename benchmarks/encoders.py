"""How near the encoders come, and how fast: N(0, 0.02), 512 x 4096, one process.

The error is root mean square over that of the weights, of what gguf-py reads back.

Example:
    python benchmarks/encoders.py
"""

from __future__ import annotations

import time

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ds4jax.quantize import FORMATS, quantize


def main():
    """Print a line for each format."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.02, (512, 4096)).astype(np.float32)
    for name in FORMATS:
        before = time.perf_counter()
        blocks = quantize(x, name, workers=1)
        seconds = time.perf_counter() - before
        error = dequantize(blocks, GGMLQuantizationType[name]) - x
        print(
            f"{name:8s} relative rms {np.sqrt(np.mean(error**2) / np.mean(x**2)):.5f},"
            f" {x.size / seconds / 1e6:5.1f} million weights a second"
        )


if __name__ == "__main__":
    main()
