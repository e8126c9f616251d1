"""What the programs of `two_maps` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx import LANES, SHARED
from ds4jax.pallas.ptx_fixed_point import Counter

OPERANDS = (
    "words", "scale", "first_quants", "first_d", "second_quants", "second_d",
    "counters", "middle_words", "middle_scale", "out", "shared",
)  # fmt: skip
"""Addresses that a program is given: `%name` in the text, `$i` in the end."""

MULTIPLIERS = 8
"""Warps that multiply; the next one has weights copied, and the others finish rows."""

FINISHERS = 3

WARPS = MULTIPLIERS + 1 + FINISHERS

COLUMNS = LANES * GROUP
"""Of a row of a weight, that a warp multiplies: a group for each lane."""

ROWS = 4
"""Of a weight, that a warp multiplies for a task."""

AHEAD = 2
"""Tasks whose weights are on their way at a time.

With as many as there is room for, six, a value is there for others 12,000 cycles after
it is written, and both maps take 21.5 us for 20.1; one is too few for the memory, 22.1.
"""

PIECE = GROUP
"""Rows of a weight that are finished together: of the first, those of a scale."""

THREADS = MULTIPLIERS * LANES
"""That multiply."""

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
    def kept(self) -> int:
        """Return for how many rows' activations there is room beside two slots."""
        room = self.room - self._others - 2 * (self.slot + 16)
        return max(min(room // self._row, self.rows), 0)

    @property
    def ring(self) -> int:
        """Return how many tasks' weights there is room for."""
        room = self.room - self._others - self.kept * self._row
        return room // (self.slot + 16)

    @property
    def staged(self) -> int:
        """Return where the activations kept are: 16 bytes of each thread in turn."""
        return self.ring * self.slot

    @property
    def staged_scale(self) -> int:
        """Return where their scales are."""
        return self.staged + self.kept * self.limbs * THREADS * GROUP

    @property
    def values(self) -> tuple[int, int]:
        """Return where the sums are of each weight's pieces, rows and parts."""
        first = self.staged_scale + self.kept * THREADS * 4
        return first, first + self._sums(0)

    @property
    def copied(self) -> int:
        """Return where the barriers are of weights that have arrived."""
        return self.values[1] + self._sums(1)

    @property
    def read(self) -> int:
        """Return where the barriers are of weights that nobody needs any more."""
        return self.copied + self.ring * 8

    @property
    def summed(self) -> tuple[int, int]:
        """Return where the barriers are of each weight's pieces."""
        first = self.read + self.ring * 8
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
    def _row(self) -> int:
        """Return the bytes of a row's activations, those of each thread."""
        return THREADS * (self.limbs * GROUP + 4)

    @property
    def _others(self) -> int:
        """Return the bytes of sums and their barriers."""
        return self._sums(0) + self._sums(1) + sum(self.pieces) * 8

    def _sums(self, number: int) -> int:
        return self.pieces[number] * self.rows * self.maps[number].parts * PIECE * 4
