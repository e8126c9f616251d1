"""Statistics of paired timings, and the cost model that they are held against.

Source: DESIGN §6.  The interval is the percentile bootstrap of a median (Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 4000
"""Of the bootstrap; the ends of an interval then move by little from seed to seed."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What repeated measurements say of one number.

    Attributes:
      median: of all, or what is made of medians.
      low, high: ends of the bootstrap 95 % interval of the median.
      least, most: of all.
      count: how many measurements.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the estimate from independent measurements, at least one.

    The same values give the same interval.  That of few values is too narrow: of n
    values the true median lies outside all of them in 2^(1-n) of cases.

    Raises:
      ValueError: if there is none.
    """
    if not len(values):
        raise ValueError("values: expected at least one, found none")
    found = np.asarray(values, np.float64)
    return _bootstrap(lambda rounds: np.median(found[rounds], axis=-1), len(found))


def slower(
    own: Sequence[Sequence[float]], rival: Sequence[Sequence[float]]
) -> Estimate:
    """Return how much slower one program is than another, as a share of its time.

    Each part's median over the rounds is taken, and their sum: a part does the same
    work in every round, so what disturbed one of them once, or a round for a while,
    does not count, as it would in the sum of a round.

    Args:
      own: seconds by round and part of the program.
      rival: the same of the other, of the same rounds; their parts may be others.

    Returns:
      That estimate, with its interval from rounds drawn again, the same of both; its
      least and most are of single rounds.
    """
    mine, theirs = np.asarray(own, np.float64), np.asarray(rival, np.float64)

    def total(parts, rounds):
        return np.median(parts[rounds], axis=-2).sum(axis=-1)

    return _bootstrap(
        lambda rounds: total(mine, rounds) / total(theirs, rounds) - 1, len(mine)
    )


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Estimate:
    """Return a statistic of `count` rounds, with its interval and its extremes.

    Args:
      statistic: given the numbers of rounds, [..., N], returns what they say, [...].
      count: how many rounds there are.
    """
    rounds = np.arange(count)
    drawn = np.random.default_rng(0).choice(count, (RESAMPLES, count))
    low, high = np.percentile(statistic(drawn), (2.5, 97.5))
    single = statistic(rounds[:, None])
    return Estimate(
        median=float(statistic(rounds)),
        low=float(low),
        high=float(high),
        least=float(single.min()),
        most=float(single.max()),
        count=count,
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a speculative cycle costs, in passes of one row.

    A cycle of `base` sure tokens and `a` accepted drafts makes `base + a` tokens, which
    one-row passes would make in `base + a`.  It takes r + d of them, so

        speed-up = (base + a) / (r + d),    and breaks even at a = r + d - base.

    At depth 1 a is the acceptance alpha, and this is (1 + alpha) / (r + d).  At depth k
    it is the mean number of drafts accepted per cycle, 0..k: the sum over places of the
    share of cycles whose draft there was accepted.  No independence of places is
    assumed, so a is measured, not predicted from alpha.

    Attributes:
      r: time of the cycle's target passes: one, or with the base pass of a chained
        cycle two.
      d: time of drafting, all places.
      base: 1, or 2 if chained.
    """

    r: float
    d: float
    base: float = 1.0

    def speedup(self, accepted: float) -> float:
        """Return the speed-up over one-row passes, given a."""
        return (self.base + accepted) / (self.r + self.d)

    @property
    def break_even(self) -> float:
        """Return the accepted drafts per cycle at which the speed-up is 1."""
        return self.r + self.d - self.base
