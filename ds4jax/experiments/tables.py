"""Markdown tables, and numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ds4jax.experiments.timing import Estimate


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all but words are set to the right."""
    rule = ["---", *("---:" for _ in heads[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def number(value: float, places: int = 2) -> str:
    """Return a number in words of a table; nothing for a NaN."""
    return "" if math.isnan(value) else f"{value:.{places}f}"


def interval(found: Estimate, places: int = 3) -> str:
    """Return a median with its interval."""
    low, high = number(found.low, places), number(found.high, places)
    return f"{number(found.median, places)} [{low}, {high}]"


def percents(found: Estimate) -> str:
    """Return a median of shares with its interval, in percent."""
    return f"{found.median:+.1%} [{found.low:+.1%}, {found.high:+.1%}]"
