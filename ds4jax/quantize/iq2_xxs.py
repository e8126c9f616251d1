"""IQ2_XXS: eight weights as a row of magnitudes and an even number of minus signs.

Each of the 256 rows is tried for every eight weights, at several scales: one product
with the weights and one with their importances give the error of all 256.  Where the
weights have an odd number of negatives, the one whose change of sign costs least is
negated first.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.quantize.scales import Codes, normalise, stored

_CODES = Codes(15, offset=0.5, unit=0.25)
# Of a group's root mean square: from where all 32 weights would be on the grid's 43 to
# where a lone one is.  Rows suit a range of scales that is wider than a step.
_FIRST_SCALES = np.geomspace(1 / 43, 32**0.5 / 43, 13, dtype=np.float32)
_REFITS = 2
_SHIFTS = np.arange(0, 28, 7, dtype=np.uint32)
_FEATURES = np.concatenate([IQ2_GRID.T, IQ2_GRID.T**2])


def encode(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return uint8 [blocks, 66] of float32 [blocks, 256].

    `weights` [blocks, 256] are those of the squared errors.
    """
    x, exponent = normalise(x)
    vectors = x.reshape(-1, 32, 8)
    weights = weights.reshape(-1, 32, 8)
    negative = vectors < 0
    flip = (weights * np.abs(vectors)).argmin(-1, keepdims=True)
    odd = np.logical_xor.reduce(negative, axis=-1, keepdims=True)
    negative ^= odd & (np.arange(8) == flip)
    search = _Vectors(np.where(negative, -vectors, vectors), weights)
    ideal, weight = search.ideal()
    d = _CODES.fit(ideal, weight, exponent)
    codes, rows = search.choose(d, _CODES.nearest(d, ideal))
    seven = np.packbits(negative[..., :7], axis=-1, bitorder="little")
    seven = seven.reshape(-1, 8, 4).astype(np.uint32) << _SHIFTS
    signs = np.bitwise_or.reduce(seven, axis=-1) | codes.astype(np.uint32) << 28
    groups = np.stack([rows.view("<u4")[..., 0], signs.astype("<u4")], axis=-1)
    scale = stored(d, exponent)[:, None]
    raw = [scale.view(np.uint8), groups.reshape(len(x), -1).view(np.uint8)]
    return np.concatenate(raw, axis=1)


@dataclasses.dataclass(frozen=True)
class _Vectors:
    """Magnitudes, negative where a sign had to change, and weights [blocks, 32, 8]."""

    magnitude: np.ndarray
    weight: np.ndarray

    def nearest(self, scale: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the best rows [blocks, 32] of the grid at scales [blocks, 8].

        With them come the weighted sums [blocks, 8] of row * magnitude and row * row.
        """
        half = np.repeat(np.float32(-0.5) * scale, 4, axis=1)[..., None]
        weighted = self.weight * self.magnitude
        # Half the fall of the squared error over the scale, for every row.  The
        # product of one block is too small for BLAS to split among threads, so its
        # bits depend on the block alone.
        fall = np.concatenate([weighted, self.weight * half], axis=-1) @ _FEATURES
        rows = fall.argmax(-1)
        magnitudes = IQ2_GRID[rows]
        product = (weighted * magnitudes).reshape(-1, 8, 32).sum(-1)
        square = (self.weight * magnitudes**2).reshape(-1, 8, 32).sum(-1)
        return rows, product, square

    def ideal(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the best real scale of each group, and the sum of row * row there."""
        energy = (self.weight * self.magnitude**2).reshape(-1, 8, 32).sum(-1)
        count = self.weight.reshape(-1, 8, 32).sum(-1)
        deviation = np.sqrt(energy / count)
        scale, squares = np.zeros_like(energy), np.zeros_like(energy)
        most = np.full_like(energy, -1)

        def consider(tried: np.ndarray):
            _, product, square = self.nearest(tried)
            solved = np.maximum(product, 0) / square
            explained = solved * product
            better = explained > most
            np.copyto(most, explained, where=better)
            np.copyto(scale, solved, where=better)
            np.copyto(squares, square, where=better)

        for first in _FIRST_SCALES:
            consider(deviation * first)
        for _ in range(_REFITS):
            consider(scale.copy())
        return scale, squares

    def choose(self, d: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best of the codes next to those given, and the rows for them.

        They are [blocks, 8] and [blocks, 8, 4].
        """
        best = codes.copy()
        best_rows = np.zeros((*codes.shape, 4), np.uint8)
        least = np.full_like(codes, np.inf)
        for step in (-1, 0, 1):
            near = np.clip(codes + step, 0, _CODES.top)
            scale = d[:, None] * _CODES.factor(near)
            rows, product, square = self.nearest(scale)
            # Squared, less that of zeros.
            error = scale * (scale * square - 2 * product)
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(best, near, where=better)
            rows = rows.reshape(best_rows.shape).astype(np.uint8)
            np.copyto(best_rows, rows, where=better[..., None])
        return best, best_rows
