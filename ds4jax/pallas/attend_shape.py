"""What attention in `attn_out`'s programs is made for, and how memory is shared out."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP, LIMBS
from ds4jax.pallas.ptx import LANES
from ds4jax.pallas.ptx_fixed_point import APART, Counter
from ds4jax.pallas.q8_arithmetic import MULTIPLIERS

WARPS = MULTIPLIERS
"""Of a program, that take part: its first ones, which multiply afterwards."""

PART = 32
"""Rows that are attended to together: four for each warp."""

HEADS = 16
"""Query heads that are multiplied together, the fewest that matrix units take."""

_MOST_BLOCKS = 2
"""Times HEADS of a task: for more there are no registers."""

CHUNK = 4 * LANES
"""Channels that a warp loads together."""

MOST_PARTS = LANES
"""Of all sources together: a lane has the peak of each."""

_PAD = 16
"""Bytes after a row in shared memory, so that the next is in other banks."""

SCORES = PART + 8
"""Numbers from one head's scores to the next one's, for the same reason."""


WRITTEN = "peak", "total", "summed", "words", "scale"
"""Names of what is written."""


class Source(NamedTuple):
    """Rows to attend to.

    Attributes:
      rows: how many there are.
      size: how many a query may see.
      chosen: whether an index says which; else they are the first ones.
    """

    rows: int
    size: int
    chosen: bool

    @property
    def parts(self) -> int:
        """Return into how many parts it is cut."""
        return pl.cdiv(self.size, PART)


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      rows: of queries, to compute.
      heads: of a query.
      width: K, channels of a head.
      turned: R, of them the last ones, which are rotated.
      groups: into how many parts the heads are cut for products.
      sources: what queries see.
      eps: of the queries' norm.
      dtype: of operands in fixed point.
      programs: that run side by side.
    """

    rows: int
    heads: int
    width: int
    turned: int
    groups: int
    sources: tuple[Source, ...]
    eps: float
    dtype: str
    programs: int

    @property
    def ends(self) -> list[int]:
        """Return the first part of each source, and behind all."""
        return list(itertools.accumulate((s.parts for s in self.sources), initial=0))

    @property
    def parts(self) -> int:
        """Return how many parts there are."""
        return self.ends[-1]

    @property
    def blocks(self) -> int:
        """Return into how many blocks of HEADS the heads are cut."""
        return self.heads // HEADS

    @property
    def each(self) -> int:
        """Return how many blocks a task is: one if all tasks run at once then.

        Else a program that has a second task would load another part's rows for it.
        """
        few = self.parts * self.blocks * self.rows <= self.programs
        return 1 if few or self.blocks % _MOST_BLOCKS else _MOST_BLOCKS

    @property
    def tasks(self) -> int:
        """Return how many there are: of a part, blocks of heads and a row each."""
        return self.parts * (self.blocks // self.each) * self.rows

    @property
    def attending(self) -> int:
        """Return how many programs have a task."""
        return min(self.tasks, self.programs)

    @property
    def pieces(self) -> int:
        """Return into how many groups the result of a head is cut."""
        return self.width // GROUP

    @property
    def units(self) -> int:
        """Return how many groups all results are."""
        return self.pieces * self.heads * self.rows

    @property
    def limbs(self) -> int:
        """Return how many limbs results have in fixed point."""
        return LIMBS[self.dtype]

    @property
    def columns(self) -> int:
        """Return the values of a group of heads."""
        return self.heads // self.groups * self.width

    @property
    def attended(self) -> Counter:
        """Return what counts programs that have done their tasks."""
        return Counter(self.attending, self.programs)

    @property
    def joined(self) -> Counter:
        """Return what counts programs that have put parts together."""
        return Counter(self.programs, self.programs)

    @property
    def counters(self) -> int:
        """Return how many counters there are room for: those two."""
        return 2 * APART

    @property
    def at_joined(self) -> int:
        """Return how many bytes after the first counter the second is."""
        return 4 * APART

    @property
    def read_operands(self) -> tuple[str, ...]:
        """Return names of what is read."""
        names = ["query", "cos", "sin", "sinks"]
        for i, source in enumerate(self.sources):
            names += [f"rows{i}", f"visible{i}"]
            names += [f"index{i}"] if source.chosen else []
        return tuple(names)

    @property
    def line(self) -> int:
        """Return the bytes from one row in shared memory to the next."""
        return 2 * self.width + _PAD

    @property
    def queries(self) -> int:
        """Return where queries are, after rows."""
        return PART * self.line

    @property
    def scores(self) -> int:
        """Return where scores are of a block, of each half of the channels.

        That is where its queries are, which all are multiplied by then.
        """
        return self.queries

    @property
    def block(self) -> int:
        """Return the bytes of a block's queries, or scores."""
        return HEADS * max(self.line, 2 * 4 * SCORES)

    @property
    def half(self) -> int:
        """Return the bytes of scores of a half."""
        return HEADS * SCORES * 4

    @property
    def scales(self) -> int:
        """Return where heads' factors are."""
        return self.scores + self.each * self.block

    @property
    def masks(self) -> int:
        """Return where it is what is added to a row's scores: 0, or minus infinity."""
        return self.scales + 4 * HEADS * self.each

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory."""
        return self.masks + 4 * PART


def serves(s: Shape) -> bool:
    """Say whether programs can be made for such sizes."""
    whole = not (s.width % CHUNK or s.heads % HEADS or s.heads % s.groups)
    turns = s.turned % GROUP == 0 and s.turned <= CHUNK
    return whole and turns and s.parts <= MOST_PARTS and s.dtype == "bfloat16"
