"""What the programs of `two_maps` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas import attend_shape
from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx import SHARED, Place
from ds4jax.pallas.ptx_fixed_point import APART, Counter
from ds4jax.pallas.q8_arithmetic import (
    COLUMNS,
    MEETING,
    MULTIPLIERS,
    ROWS,
    SLOT,
    Kept,
    kept_at,
    kept_bytes,
    kept_rows,
)
from ds4jax.pallas.ring import AHEAD, FIRST, Ring

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
      attention: what gives the activations, if the launch does.
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
    attention: attend_shape.Shape | None = None
    room: int = SHARED

    @property
    def operands(self) -> tuple[str, ...]:
        """Return the addresses a program is given: `%name` in the text, `$i` later."""
        given, found = ("words", "scale"), ()
        if self.attention:
            given, found = self.attention.read_operands, attend_shape.WRITTEN
        weights = "first_quants", "first_d", "second_quants", "second_d", "counters"
        results = "middle_words", "middle_scale", "out"
        return *given, *weights, *found, *results, "shared"

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
        return (self.room - self._others - self._staged) // (SLOT + 16)

    @property
    def kept(self) -> Kept:
        """Return where they are kept."""
        return kept_at(self.slots * SLOT, self.kept_rows, self.limbs)

    @property
    def values(self) -> tuple[int, int]:
        """Return where the sums are of each weight's pieces, rows and parts."""
        first = self.slots * SLOT + self._staged
        return first, first + self._sums(0)

    @property
    def ring(self) -> Ring:
        """Return the ring of tasks' weights."""
        barriers = self.values[1] + self._sums(1)
        first = FIRST if self.attention else AHEAD
        return Ring(self.slots, SLOT, barriers, MULTIPLIERS, first)

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
    def place(self) -> Place:
        """Return where attention has room: where activations are kept after it."""
        return Place(self.slots * SLOT, 4 * self._middle_counters, MEETING)

    @property
    def counters(self) -> int:
        """Return how many numbers there are of which some are counters."""
        attention = self.attention.counters if self.attention else 0
        return self._middle_counters + attention

    @property
    def counter(self) -> Counter:
        """Return what each part of the second weight's columns has."""
        second = self.maps[1]
        waiting = min(second.rows // second.lines, self.programs)
        each = MULTIPLIERS // second.parts
        return Counter(COLUMNS // PIECE * self.rows, waiting * each)

    @property
    def _middle_counters(self) -> int:
        return self.maps[1].parts * APART

    @property
    def _staged(self) -> int:
        """Return the bytes of what activations are kept in, and attended in before."""
        kept = self.kept_rows * kept_bytes(self.limbs)
        return max(kept, self.attention.shared if self.attention else 0)

    @property
    def _others(self) -> int:
        """Return the bytes of sums and their barriers."""
        return self._sums(0) + self._sums(1) + sum(self.pieces) * 8

    def _sums(self, number: int) -> int:
        return self.pieces[number] * self.rows * self.maps[number].parts * PIECE * 4
