"""What the programs of `attn_maps` are made for, and how memory is shared out."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.latent import Latent
from ds4jax.pallas.ptx import LANES, SHARED
from ds4jax.pallas.ptx_fixed_point import Counter
from ds4jax.pallas.q8_arithmetic import MULTIPLIERS, ROWS, THREADS, Kept, kept_bytes
from ds4jax.pallas.ring import Ring

FINISHERS = 3
"""Warps that add parts up; one more has weights copied."""

WARPS = MULTIPLIERS + 1 + FINISHERS

PART = LANES * GROUP
"""Bytes of a row of a weight that a warp multiplies: 32 for each lane."""

FIRST = 1
"""Tasks whose weights are on their way at a time until the ring is full."""

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
        return self.row // PART

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
      rows: of the activations, that are computed.
      written: rows of the results: after those computed copies of the last of them.
      maps: the weights, those of the input first, and of these the queries' latent's.
      dtype: of operands.
      eps: of the latent's RMS norm.
      programs: that run side by side.
      room: bytes of shared memory that there are.
    """

    rows: int
    written: int
    maps: tuple[Map, ...]
    dtype: str
    eps: float
    programs: int
    room: int = SHARED

    @property
    def operands(self) -> tuple[str, ...]:
        """Return the addresses a program is given: `%name` in the text, `$i` later."""
        planes = [name for m in self.maps for name, _ in m.planes]
        given = "words", "scale", "x", "norm", *planes, "counters"
        return *given, *(m.out for m in self.maps), "shared"

    @property
    def limbs(self) -> int:
        """Return the limbs of the activations."""
        return LIMBS[self.dtype]

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
    def slot(self) -> int:
        """Return the bytes of a task's weights at most."""
        return MULTIPLIERS * ROWS * (PART + PART // GROUP * 2)

    @property
    def kept_rows(self) -> int:
        """Return for how many rows' activations there is room beside two slots."""
        room = self.room - self._others - 2 * (self.slot + 16)
        return max(min(room // kept_bytes(self.limbs), self.rows), 0)

    @property
    def slots(self) -> int:
        """Return for how many tasks' weights there is room."""
        room = self.room - self._others - self._kept_bytes
        return room // (self.slot + 16)

    @property
    def kept(self) -> Kept:
        """Return where activations are kept."""
        at = self.slots * self.slot
        at_scale = at + self.kept_rows * self.limbs * THREADS * GROUP
        return Kept(self.kept_rows, 2 * self.limbs, at, at_scale)

    @property
    def latent(self) -> Latent:
        """Return where the queries' latent is kept: there, when they are multiplied."""
        at = self.slots * self.slot
        return Latent(self.rows, self.limbs, self.dtype, self.eps, at)

    @property
    def _kept_bytes(self) -> int:
        """Return the bytes of either."""
        size = Latent(self.rows, self.limbs, self.dtype, self.eps, 0).end
        return max(self.kept_rows * kept_bytes(self.limbs), size)

    @property
    def values(self) -> int:
        """Return where the sums of tasks are, by rows of activations."""
        return self.slots * self.slot + self._kept_bytes

    @property
    def ring(self) -> Ring:
        """Return the ring of tasks' weights."""
        at = self.values + self._sums
        return Ring(self.slots, self.slot, at, MULTIPLIERS, FIRST)

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
