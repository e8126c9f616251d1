"""What the programs of `two_maps` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx import SHARED
from ds4jax.pallas.ptx_fixed_point import Counter
from ds4jax.pallas.q8_arithmetic import (
    COLUMNS,
    MULTIPLIERS,
    ROWS,
    THREADS,
    Kept,
    kept_bytes,
)
from ds4jax.pallas.ring import Ring

OPERANDS = (
    "words", "scale", "first_quants", "first_d", "second_quants", "second_d",
    "counters", "middle_words", "middle_scale", "out", "shared",
)  # fmt: skip
"""Addresses that a program is given: `%name` in the text, `$i` in the end."""

FINISHERS = 3
"""Warps that finish rows; one more has weights copied."""

WARPS = MULTIPLIERS + 1 + FINISHERS

PIECE = GROUP
"""Rows of a weight that are finished together: of the first, those of a scale."""

APART = 32
"""Counters from one that programs use to the next: they ask different parts of L2."""


class Map(NamedTuple):
    """One of the two weights.

    Attributes:
      name: of its operands.
      rows: of the weight.
      columns: of the weight.
    """

    name: str
    rows: int
    columns: int

    @property
    def parts(self) -> int:
        """Return how many warps a row takes."""
        return self.columns // COLUMNS

    @property
    def lines(self) -> int:
        """Return the rows of a task."""
        return MULTIPLIERS // self.parts * ROWS

    @property
    def each(self) -> int:
        """Return the tasks of a piece."""
        return PIECE // self.lines


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      rows: of the activations, that are computed.
      written: rows of the result: after those computed copies of the last of them.
      groups: of the first weight.
      columns: of the first weight.
      middle: rows of the first weight, columns of the second.
      out: rows of the second weight.
      dtype: of operands.
      programs: that run side by side.
      room: bytes of shared memory that there are.
    """

    rows: int
    written: int
    groups: int
    columns: int
    middle: int
    out: int
    dtype: str
    programs: int
    room: int = SHARED

    @property
    def maps(self) -> tuple[Map, Map]:
        """Return both weights."""
        first = Map("first", self.middle, self.columns)
        return first, Map("second", self.out, self.middle)

    @property
    def limbs(self) -> int:
        """Return the limbs of the activations."""
        return LIMBS[self.dtype]

    @property
    def pieces(self) -> tuple[int, int]:
        """Return how many pieces of each weight a program has at most."""
        first, second = self.maps
        tasks = pl.cdiv(second.rows // second.lines, self.programs)
        pieces = pl.cdiv(first.rows // PIECE, self.programs)
        return pieces, pl.cdiv(tasks, second.each)

    @property
    def quants(self) -> int:
        """Return the bytes of a task's quants."""
        return MULTIPLIERS * ROWS * COLUMNS

    @property
    def slot(self) -> int:
        """Return the bytes of a task's weights: quants, then d."""
        return self.quants + self.quants // GROUP * 2

    @property
    def kept_rows(self) -> int:
        """Return for how many rows' activations there is room beside two slots."""
        room = self.room - self._others - 2 * (self.slot + 16)
        return max(min(room // kept_bytes(self.limbs), self.rows), 0)

    @property
    def slots(self) -> int:
        """Return for how many tasks' weights there is room."""
        room = self.room - self._others - self.kept_rows * kept_bytes(self.limbs)
        return room // (self.slot + 16)

    @property
    def kept(self) -> Kept:
        """Return where they are kept."""
        at = self.slots * self.slot
        at_scale = at + self.kept_rows * self.limbs * THREADS * GROUP
        return Kept(self.kept_rows, 2 * self.limbs, at, at_scale)

    @property
    def values(self) -> tuple[int, int]:
        """Return where the sums are of each weight's pieces, rows and parts."""
        first = self.kept.at_scale + self.kept_rows * THREADS * 4
        return first, first + self._sums(0)

    @property
    def ring(self) -> Ring:
        """Return the ring of tasks' weights."""
        barriers = self.values[1] + self._sums(1)
        return Ring(self.slots, self.slot, barriers, MULTIPLIERS)

    @property
    def summed(self) -> tuple[int, int]:
        """Return where the barriers are of each weight's pieces."""
        first = self.ring.end
        return first, first + self.pieces[0] * 8

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory that a program has."""
        return self.summed[1] + self.pieces[1] * 8

    @property
    def counters(self) -> int:
        """Return how many numbers there are of which some are counters."""
        return self.maps[1].parts * APART

    @property
    def counter(self) -> Counter:
        """Return what each part of the second weight's columns has."""
        second = self.maps[1]
        waiting = min(second.rows // second.lines, self.programs)
        each = MULTIPLIERS // second.parts
        return Counter(COLUMNS // PIECE * self.rows, waiting * each)

    @property
    def _others(self) -> int:
        """Return the bytes of sums and their barriers."""
        return self._sums(0) + self._sums(1) + sum(self.pieces) * 8

    def _sums(self, number: int) -> int:
        return self.pieces[number] * self.rows * self.maps[number].parts * PIECE * 4
