"""What the programs of `iq2_gated` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas.fixed_point import GROUP, Order
from ds4jax.pallas.ptx import LANES

OPERANDS = (
    "ids", "words", "scale", "table", "gate_grid", "gate_signs", "gate_d", "up_grid",
    "up_signs", "up_d", "to_words", "to_scale", "to_sums", "shared",
)  # fmt: skip
"""Addresses that a program is given: `%name` in the text, `$i` in the end."""

WARPS = 8
"""Of a program: a thread for each entry of the table."""

BLOCK = 8
"""Groups that share a `d`."""

ROWS = 2 * GROUP // WARPS
"""That a warp multiplies for a task: first those of gate, then those of up."""

EACH = LANES // ROWS
"""Lanes that the sum of a row is left with."""

TABLE = WARPS * LANES * LANES * 4
"""Bytes of the table."""


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      pairs: rows times the experts of each.
      each: experts of a row.
      out: rows of an expert's weight.
      groups: of a row, of the activations and of the weight.
      limbs: of the activations.
      order: of the result.
      dtype: of operands that the result is rounded to.
      limit: of the SwiGLU.
      programs: that run side by side.
    """

    pairs: int
    each: int
    out: int
    groups: int
    limbs: int
    order: Order
    dtype: str
    limit: float
    programs: int

    @property
    def steps(self) -> int:
        """Return how many groups of a row a lane takes."""
        return self.groups // LANES

    @property
    def tiles(self) -> int:
        """Return how many tasks a pair is."""
        return self.out // GROUP

    @property
    def plane(self) -> int:
        """Return the bytes of a task's words of the grid, or of the signs."""
        return 2 * GROUP * self.groups * 4

    @property
    def slot(self) -> int:
        """Return the bytes of a task's weights: grid, signs, d, each gate before up."""
        return 2 * self.plane + 2 * GROUP * self.groups // BLOCK * 2

    @property
    def values(self) -> int:
        """Return where in shared memory the values of two tasks are exchanged."""
        return TABLE + 2 * self.slot

    @property
    def copied(self) -> int:
        """Return where the barriers are of two tasks' weights."""
        return self.values + 2 * GROUP * 4

    @property
    def settled(self) -> int:
        """Return where the barriers are of two tasks' values."""
        return self.copied + 16

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory."""
        return self.settled + 16
