"""The two levels of scales of a 256-weight block: small integers times a float16.

Blocks are brought to a largest magnitude between 1/2 and 1 by a power of two before
anything is fitted: exact, and no square under- or overflows.  `d` below is the float16
in these units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
# Below 2^-30 no format has a value that is nearer than zero.
_LEAST_EXPONENT = -30


def normalise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [blocks, 256] over powers of two, and int exponents [blocks]."""
    _, exponent = np.frexp(np.abs(x).max(1))
    exponent = np.maximum(exponent, _LEAST_EXPONENT)
    return np.ldexp(x, -exponent[:, None]), exponent


def stored(d: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return the float16 that stands for `d`: 0, or from the least subnormal up."""
    with np.errstate(over="ignore"):  # infinity is clamped too
        d = np.ldexp(d, exponent)
    return np.where(d > 0, np.clip(d, _SMALLEST, _LARGEST), 0).astype("<f2")


def rounded(d: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return `d` as float16 keeps it, float32 in the units of the block."""
    return np.ldexp(stored(d, exponent).astype(np.float32), -exponent)


@dataclasses.dataclass(frozen=True)
class Codes:
    """Integers 0..top that stand for `d * (code + offset) * unit`."""

    top: int
    offset: float = 0.0
    unit: float = 1.0

    def factor(self, code: np.ndarray) -> np.ndarray:
        """Return what multiplies `d`."""
        return (code + np.float32(self.offset)) * np.float32(self.unit)

    def nearest(self, d: np.ndarray, ideal: np.ndarray) -> np.ndarray:
        """Return float32 codes [blocks, groups] nearest to the ideal scales."""
        step = np.where(d > 0, d * np.float32(self.unit), np.float32(np.inf))
        code = np.rint(ideal / step[:, None] - np.float32(self.offset))
        return np.clip(code, 0, self.top)

    def fit(
        self, ideal: np.ndarray, weights: np.ndarray, exponent: np.ndarray
    ) -> np.ndarray:
        """Return the rounded `d` [blocks] whose codes come nearest to `ideal`.

        Args:
          ideal: float32 [blocks, groups], not negative.
          weights: what a squared deviation costs, of the same shape.
          exponent: of `normalise`.
        """
        largest = ideal.max(1)
        best = np.zeros_like(largest)
        least = (weights * ideal * ideal).sum(1)
        # The largest scale may get any of the upper codes.  Half steps in between
        # matter where codes are few.
        step = 0.5 if self.top < 16 else 1.0
        upper = np.arange(self.top, self.top / 3, -step, dtype=np.float32)
        for code in upper[:, None]:
            d = rounded(largest / self.factor(code), exponent)
            error = d[:, None] * self.factor(self.nearest(d, ideal)) - ideal
            cost = (weights * error * error).sum(1)
            # Weights far beyond float16 leave every d the same cost, to float32: <=
            # takes the largest there is, not zero.
            better = cost <= least
            np.copyto(least, cost, where=better)
            np.copyto(best, d, where=better)
        return best
