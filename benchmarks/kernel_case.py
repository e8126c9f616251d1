"""What `kernel_times.py` measures: something that a kernel and XLA both compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPE = "bfloat16"
"""Operand type of the products."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to compute, which has a line in the table for each number of rows.

    Attributes:
      kernel: the file in `ds4jax/pallas`.
      what: it computes.
      draw: returns the operands, for the rows that a pass has whatever its width.
      run: computes it by the kernel, given the width of the pass and the operands.
      xla: computes it by XLA's operations, given the operands.
      nbytes: of what has to be read, given the width and the operands.
      widths: how many rows count.
      others: how names of kernels begin that take part and have lines of their own.
      donated: which operands are changed in place.
      exact: returns what comes first of the results in float64, given the operands.
      shape: columns that only products have.
    """

    kernel: str
    what: str
    draw: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    xla: Callable[..., Any]
    nbytes: Callable[..., float]
    widths: tuple[int, ...] = (1, 2)
    others: tuple[str, ...] = ()
    donated: tuple[int, ...] = ()
    exact: Callable[..., np.ndarray] | None = None
    shape: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("format", "out", "into", "groups"), "")
    )


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    """Return random numbers of size 1."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def choice(seed: int, rows: int, count: int, used: int) -> jax.Array:
    """Return `used` different numbers below `count` for each row, [1, rows, used]."""
    return jax.lax.top_k(normal(seed, 1, rows, count), used)[1]
