"""Q2_K and Q4_K: small groups of few-bit quants, each with its scale and its minimum.

A weight is `scale * quant - minimum`, both not negative, and both a float16 of the
block times a small integer of the group.  First each group gets the best real scale
and minimum: the rounding of the weights is tried at a row of scales, and least squares
solves for the pair that suits it.  Then integers and float16s are chosen in turns.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from ds4jax.quantize.scales import Codes, normalise, rounded, stored

# Highest quants that a group's range may be stretched to, less the highest there is.
_STRETCHES = np.linspace(-1, 0.9, 20, dtype=np.float32)
_REFITS = 2
_TURNS = 2
_TINY = np.float32(1e-30)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """`groups` of `size` quants 0..top; scales and minima are `codes`."""

    groups: int
    size: int
    top: int
    codes: Codes


_Q2_K = _Layout(groups=16, size=16, top=3, codes=Codes(15))
_Q4_K = _Layout(groups=8, size=32, top=15, codes=Codes(63))


def encode_q2_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return uint8 [blocks, 84] of float32 [blocks, 256].

    `weights` [blocks, 256] are those of the squared errors.
    """
    quants, scales, mins, d, dmin = _encode(x, weights, _Q2_K)
    fields = quants.reshape(-1, 2, 4, 32)
    packed = fields[:, :, 0] | fields[:, :, 1] << 2
    packed |= fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    return _join(scales | mins << 4, packed.reshape(-1, 64), d, dmin)


def encode_q4_k(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return uint8 [blocks, 144] of float32 [blocks, 256].

    `weights` [blocks, 256] are those of the squared errors.
    """
    quants, scales, mins, d, dmin = _encode(x, weights, _Q4_K)
    fields = quants.reshape(-1, 4, 2, 32)
    packed = fields[:, :, 0] | fields[:, :, 1] << 4
    first, last = slice(None, 4), slice(4, None)
    six_bits = (
        scales[:, first] | scales[:, last] >> 4 << 6,
        mins[:, first] | mins[:, last] >> 4 << 6,
        scales[:, last] & 15 | (mins[:, last] & 15) << 4,
    )
    return _join(d, dmin, *six_bits, packed.reshape(-1, 128))


def _join(*fields: np.ndarray) -> np.ndarray:
    """Return the bytes of fields [blocks, ...] side by side."""
    return np.concatenate([field.view(np.uint8) for field in fields], axis=1)


def _encode(x: np.ndarray, weights: np.ndarray, layout: _Layout) -> tuple:
    """Return uint8 quants, scales and minima, and float16 d and dmin [blocks, 1]."""
    x, exponent = normalise(x)
    groups = _Groups(_columns(x, layout), _columns(weights, layout), layout)
    codes = layout.codes
    scales, mins = groups.ideal()
    weight = groups.weight.sum(0).reshape(scales.shape)
    d, dmin = (codes.fit(part, weight, exponent) for part in (scales, mins))
    best = groups.choose(d, dmin, codes.nearest(d, scales), codes.nearest(dmin, mins))
    for _ in range(_TURNS):
        new_d, new_dmin = groups.refit(d, dmin, best, exponent)
        new = groups.choose(new_d, new_dmin, best.scales, best.mins)
        better = new.error.sum(1) < best.error.sum(1)
        d, dmin = np.where(better, new_d, d), np.where(better, new_dmin, dmin)
        best = new.where(better[:, None], best)
    quants, _ = groups.quantise(d, dmin, best.scales, best.mins)
    rows = quants.astype(np.uint8).reshape(layout.size, -1, layout.groups)
    return (
        rows.transpose(1, 2, 0),
        best.scales.astype(np.uint8),
        best.mins.astype(np.uint8),
        stored(d, exponent)[:, None],
        stored(dmin, exponent)[:, None],
    )


def _columns(blocks: np.ndarray, layout: _Layout) -> np.ndarray:
    """Return [size, blocks * groups]: numpy is fast along a long last axis."""
    return np.ascontiguousarray(blocks.reshape(-1, layout.size).T)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Codes of scales and minima, and the squared errors, [blocks, groups]."""

    scales: np.ndarray
    mins: np.ndarray
    error: np.ndarray

    def where(self, better: np.ndarray, old: _Choice) -> _Choice:
        """Return this choice where `better`, else the old one."""
        return _Choice(
            np.where(better, self.scales, old.scales),
            np.where(better, self.mins, old.mins),
            np.where(better, self.error, old.error),
        )


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Weights and what their squared errors cost, one column for each group."""

    x: np.ndarray
    weight: np.ndarray
    layout: _Layout

    def ideal(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the best real scale and minimum of each group, [blocks, groups]."""
        top, weight = self.layout.top, self.weight
        low = np.minimum(self.x.min(0), 0)
        y = self.x - low
        span = y.max(0)
        span = np.where(span > 0, span, 1)
        weighted = weight * y
        sum_w, sum_y, sum_yy = weight.sum(0), weighted.sum(0), (weighted * y).sum(0)
        # y is scale * quant + offset: the values above the lowest, so that sums of
        # squares lose nothing to a minimum that is large beside the range.
        scale, offset = np.zeros_like(low), np.zeros_like(low)
        least = np.full_like(low, np.inf)

        def consider(quants: np.ndarray):
            np.clip(np.rint(quants, out=quants), 0, top, out=quants)
            sum_q, sum_qq, sum_qy = _moments(weight, quants, y)
            det = sum_w * sum_qq - sum_q * sum_q
            regular = det > 1e-6 * sum_w * sum_qq
            solved = (sum_qq * sum_y - sum_q * sum_qy) / np.where(regular, det, 1)
            # A minimum is not negative, so the offset is -low at most.
            new_offset = np.minimum(np.where(regular, solved, 0), -low)
            new_scale = (sum_qy - new_offset * sum_q) / np.maximum(sum_qq, _TINY)
            new_scale = np.maximum(new_scale, 0)
            error = (
                sum_yy
                - 2 * (new_scale * sum_qy + new_offset * sum_y)
                + new_scale * (new_scale * sum_qq + 2 * new_offset * sum_q)
                + new_offset * new_offset * sum_w
            )
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(scale, new_scale, where=better)
            np.copyto(offset, new_offset, where=better)

        for stretch in _STRETCHES:
            consider(y * ((top + stretch) / span))
        for _ in range(_REFITS):
            consider((y - offset) / np.maximum(scale, _TINY))
        shape = (-1, self.layout.groups)
        return scale.reshape(shape), -(low + offset).reshape(shape)

    def quantise(
        self, d: np.ndarray, dmin: np.ndarray, scales: np.ndarray, mins: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest quants, and the squared errors [blocks, groups]."""
        step = (d[:, None] * scales).reshape(-1)
        above = self.x + (dmin[:, None] * mins).reshape(-1)
        quants = above / np.where(step > 0, step, np.float32(np.inf))
        np.clip(np.rint(quants, out=quants), 0, self.layout.top, out=quants)
        error = quants * step
        error -= above
        error *= error
        error *= self.weight
        return quants, error.sum(0).reshape(scales.shape)

    def choose(
        self, d: np.ndarray, dmin: np.ndarray, scales: np.ndarray, mins: np.ndarray
    ) -> _Choice:
        """Return the best of the codes next to those given, group by group."""
        _, error = self.quantise(d, dmin, scales, mins)
        best = _Choice(scales, mins, error)
        for step, step_min in itertools.product((-1, 0, 1), repeat=2):
            if step == step_min == 0:
                continue
            near = np.clip(scales + step, 0, self.layout.codes.top)
            near_min = np.clip(mins + step_min, 0, self.layout.codes.top)
            _, error = self.quantise(d, dmin, near, near_min)
            new = _Choice(near, near_min, error)
            best = new.where(error < best.error, best)
        return best

    def refit(
        self, d: np.ndarray, dmin: np.ndarray, choice: _Choice, exponent: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rounded d and dmin [blocks] that suit the choice's quants best."""
        scales, mins = choice.scales, choice.mins
        quants, _ = self.quantise(d, dmin, scales, mins)
        sum_q, sum_qq, sum_qx = (
            part.reshape(scales.shape) for part in _moments(self.weight, quants, self.x)
        )
        sum_w = self.weight.sum(0).reshape(scales.shape)
        sum_x = (self.weight * self.x).sum(0).reshape(scales.shape)
        # The normal equations of x = d * (scale * quant) - dmin * minimum.
        a = (scales * scales * sum_qq).sum(1)
        b = (scales * mins * sum_q).sum(1)
        c = (mins * mins * sum_w).sum(1)
        u, v = (scales * sum_qx).sum(1), (mins * sum_x).sum(1)
        det = a * c - b * b
        regular = det > 1e-6 * a * c
        solved = (b * u - a * v) / np.where(regular, det, 1)
        dmin = rounded(np.where(regular, solved, dmin), exponent)
        return rounded((u + b * dmin) / np.maximum(a, _TINY), exponent), dmin


def _moments(
    weight: np.ndarray, quants: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weighted sums of q, q * q and q * y over each group."""
    weighted = weight * quants
    return weighted.sum(0), (weighted * quants).sum(0), (weighted * y).sum(0)
