"""What the programs of `attn_maps` are made for, and how memory is shared out."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas import hc_shape
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.latent import Latent
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
from ds4jax.pallas.ring import FIRST, Ring

SUMS = MULTIPLIERS * ROWS
"""Sums of a task, for each row of activations."""


class Map(NamedTuple):
    """A weight.

    Attributes:
      name: of its operands and its result.
      is_q8_0: whether it is in Q8_0, float16 else.
      rows: of the weight.
      columns: of the weight.
      is_second: whether it is for the queries' latent, normed; for the input else.
    """

    name: str
    is_q8_0: bool
    rows: int
    columns: int
    is_second: bool

    @property
    def row(self) -> int:
        """Return the bytes of a row, without `d`."""
        return self.columns if self.is_q8_0 else 2 * self.columns

    @property
    def parts(self) -> int:
        """Return how many warps a row takes."""
        return self.row // COLUMNS

    @property
    def lines(self) -> int:
        """Return the rows of a task."""
        return MULTIPLIERS // self.parts * ROWS

    @property
    def tasks(self) -> int:
        """Return how many there are."""
        return self.rows // self.lines

    @property
    def planes(self) -> tuple[tuple[str, int], ...]:
        """Return its operands, and a task's bytes of each."""
        size = self.lines * self.row
        if not self.is_q8_0:
            return ((self.name, size),)
        return (f"{self.name}_quants", size), (f"{self.name}_d", size // GROUP * 2)

    @property
    def out(self) -> str:
        """Return the name of its result."""
        return f"to_{self.name}"


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      maps: the weights: those of the input, of which the first gives the queries'
        latent, and then those of the latent.
      eps: of the latent's RMS norm.
      hc: the reading of the streams that comes first.
      room: bytes of shared memory that there are.
    """

    maps: tuple[Map, ...]
    eps: float
    hc: hc_shape.Shape
    room: int = SHARED

    @property
    def operands(self) -> tuple[str, ...]:
        """Return the addresses a program is given: `%name` in the text, `$i` later."""
        planes = [name for m in self.maps for name, _ in m.planes]
        given = *self.hc.read_operands, "latent_norm", *planes, "counters"
        found = *self.hc.written_operands, *(m.out for m in self.maps)
        return *given, *found, "shared"

    @property
    def rows(self) -> int:
        """Return how many rows of activations are computed."""
        return self.hc.rows

    @property
    def limbs(self) -> int:
        """Return the limbs of the activations."""
        return self.hc.limbs

    @property
    def programs(self) -> int:
        """Return how many programs run side by side."""
        return self.hc.programs

    @property
    def place(self) -> Place:
        """Return where the reading has room: where activations are kept after it."""
        return Place(self._staged, 4 * APART, MEETING)

    @property
    def seconds(self) -> int:
        """Return how many tasks the second maps are."""
        return sum(m.tasks for m in self.maps if m.is_second)

    @property
    def tasks(self) -> int:
        """Return how many tasks a program has at most."""
        return pl.cdiv(sum(m.tasks for m in self.maps), self.programs)

    @property
    def kinds(self) -> list[list[Map]]:
        """Return the maps by runs of those that are multiplied alike."""
        key = lambda m: (m.is_second, m.is_q8_0, m.columns)  # noqa: E731
        return [list(maps) for _, maps in itertools.groupby(self.maps, key)]

    def first(self, m: Map) -> int:
        """Return which program has the first task of a map: they take turns."""
        before = self.maps[: self.maps.index(m)]
        return sum(other.tasks for other in before) % self.programs

    @property
    def counter(self) -> Counter:
        """Return what counts tasks of the latent."""
        return Counter(self.maps[0].tasks, min(self.seconds, self.programs))

    @property
    def counters(self) -> int:
        """Return how many counters there is room for: that, and the reading's."""
        return APART + self.hc.counters

    @property
    def kept_rows(self) -> int:
        """Return for how many rows' activations there is room beside two slots."""
        return kept_rows(self.rows, self.limbs, self.room - self._others)

    @property
    def slots(self) -> int:
        """Return for how many tasks' weights there is room."""
        room = self.room - self._others - self._staged_bytes
        return room // (SLOT + 16)

    @property
    def kept(self) -> Kept:
        """Return where activations are kept."""
        return kept_at(self._staged, self.kept_rows, self.limbs)

    @property
    def latent(self) -> Latent:
        """Return where the latent is kept: there, when those are multiplied."""
        return Latent(self.rows, self.limbs, self.hc.dtype, self.eps, self._staged)

    @property
    def values(self) -> int:
        """Return where the sums of tasks are, by rows of activations."""
        return self._staged + self._staged_bytes

    @property
    def ring(self) -> Ring:
        """Return the ring of tasks' weights."""
        at = self.values + self._sums
        return Ring(self.slots, SLOT, at, MULTIPLIERS, FIRST)

    @property
    def summed(self) -> int:
        """Return where the barriers are of tasks that are multiplied."""
        return self.ring.end

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory that a program has."""
        return self.summed + 8 * self.tasks

    @property
    def _sums(self) -> int:
        return self.tasks * self.rows * SUMS * 4

    @property
    def _others(self) -> int:
        """Return the bytes of sums and their barriers."""
        return self._sums + 8 * self.tasks

    @property
    def _staged(self) -> int:
        """Return where all that is multiplied by weights is, one after the other."""
        return self.slots * SLOT

    @property
    def _staged_bytes(self) -> int:
        """Return the bytes that most of it is at a time."""
        latent = Latent(self.rows, self.limbs, self.hc.dtype, self.eps, 0)
        kept = self.kept_rows * kept_bytes(self.limbs)
        return max(kept, latent.end, self.hc.shared)
