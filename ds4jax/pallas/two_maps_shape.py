"""What the programs of `two_maps` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx import SHARED
from ds4jax.pallas.ptx_fixed_point import APART, Counter
from ds4jax.pallas.q8_arithmetic import (
    COLUMNS,
    MULTIPLIERS,
    ROWS,
    SLOT,
    Kept,
    kept_at,
    kept_bytes,
    kept_rows,
)
from ds4jax.pallas.ring import Ring

OPERANDS = (
    "words", "scale", "first_quants", "first_d", "second_quants", "second_d",
    "counters", "middle_words", "middle_scale", "out", "shared",
)  # fmt: skip
"""Addresses that a program is given: `%name` in the text, `$i` in the end."""

PIECE = GROUP
"""Rows of a weight that are finished together: of the first, those of a scale."""


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
    def kept_rows(self) -> int:
        """Return for how many rows' activations there is room beside two slots."""
        return kept_rows(self.rows, self.limbs, self.room - self._others)

    @property
    def slots(self) -> int:
        """Return for how many tasks' weights there is room."""
        room = self.room - self._others - self.kept_rows * kept_bytes(self.limbs)
        return room // (SLOT + 16)

    @property
    def kept(self) -> Kept:
        """Return where they are kept."""
        return kept_at(self.slots * SLOT, self.kept_rows, self.limbs)

    @property
    def values(self) -> tuple[int, int]:
        """Return where the sums are of each weight's pieces, rows and parts."""
        first = self.slots * SLOT + self.kept_rows * kept_bytes(self.limbs)
        return first, first + self._sums(0)

    @property
    def ring(self) -> Ring:
        """Return the ring of tasks' weights."""
        barriers = self.values[1] + self._sums(1)
        return Ring(self.slots, SLOT, barriers, MULTIPLIERS)

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
