"""Random weights made on the device, and what making them took."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax

from ds4jax import synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.pallas.passes import Weight


@dataclasses.dataclass(frozen=True)
class Made:
    """What is on the device.

    Attributes:
      tensors: how many.
      nbytes: theirs, packed.
      seconds: until the last was there, compilation included.
    """

    tensors: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        """Return it in words."""
        return (
            f"{self.tensors:,} tensors, {self.nbytes:,} bytes in {self.seconds:.2f} s"
            f" ({self.nbytes / self.seconds / 1e9:.2f} GB/s)"
        )


def make(
    config: ModelConfig, plan: QuantPlan, seed: int, *, mtp: bool
) -> tuple[Mapping[str, Weight], Made]:
    """Return `synthetic.weights`, once they are there, and the measurement.

    Raises:
      ConfigError: as `synthetic.weights`.
    """
    before = time.perf_counter()
    weights = synthetic.weights(config, plan, seed, mtp=mtp)
    jax.block_until_ready(weights)
    seconds = time.perf_counter() - before
    nbytes = sum(weight.nbytes for weight in weights.values())
    return weights, Made(len(weights), nbytes, seconds)


def peak(stats: Mapping[str, int] | None) -> str:
    """Put in words how much memory was in use at most.

    Args:
      stats: a device's `memory_stats()`, which not every backend has.
    """
    if not stats or "peak_bytes_in_use" not in stats:
        return "peak memory not told by this backend"
    return f"peak memory {stats['peak_bytes_in_use']:,} bytes"
