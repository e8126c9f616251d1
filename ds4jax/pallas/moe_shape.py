"""What the programs of `moe_ptx` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas.fixed_point import GROUP, LIMBS, Order
from ds4jax.pallas.ptx import LANES
from ds4jax.pallas.ptx_fixed_point import Counter

OPERANDS = (
    "ids", "share", "words", "scale", "table", "gate_grid", "gate_signs", "gate_d",
    "up_grid", "up_signs", "up_d", "quants", "scales", "d", "dmin", "shexp_words",
    "shexp_scale", "shexp_quants", "shexp_d", "finished", "hidden_words",
    "hidden_scale", "hidden_sums", "to_shexp", "to_routed", "shared",
)  # fmt: skip
"""Addresses that a program is given: `%name` in the text, `$i` in the end.

`shexp` is the shared expert, as in GGUF, and `shared` the memory.
"""

WARPS = 8
"""Of a program, that multiply: a thread for each entry of the table."""

THREADS = (WARPS + 4) * LANES
"""Of a program: warps come by four, and three others serve those that multiply."""

BLOCK = 8
"""Groups that share a `d`."""

ROWS = 2 * GROUP // WARPS
"""That a warp multiplies of gate and up, every WARPS-th, those of gate before up's."""

HALF = GROUP // 2
"""Rows of gate, and of up, that are copied together."""

EACH = LANES // ROWS
"""Lanes that the sum of one of those rows is left with."""

DOWN_ROWS = GROUP // WARPS
"""That a warp multiplies of a weight of down."""

TABLE = WARPS * LANES * LANES * 4
"""Bytes of the table."""

HIDDEN = 2048
"""Hidden values of an expert: each lane has a chunk of 64, in Q2_K 16 bytes."""

ORDER = Order(levels=4)
"""Of the routed experts' hidden values, as Q2_K is read."""


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      rows: to compute.
      copied_rows: whose results are copies of the last one's.
      each: experts of a row.
      groups: of a row, of the activations and of gate and up.
      out: rows of a weight of down.
      dtype: of operands.
      limit: of the SwiGLU.
      programs: that run side by side.
    """

    rows: int
    copied_rows: int
    each: int
    groups: int
    out: int
    dtype: str
    limit: float
    programs: int

    @property
    def limbs(self) -> int:
        """Return how many limbs activations have."""
        return LIMBS[self.dtype]

    @property
    def pairs(self) -> int:
        """Return how many rows with an expert of theirs there are."""
        return self.rows * self.each

    @property
    def parts(self) -> int:
        """Return how many tasks a block of the routed experts' down is."""
        return self.pairs // self.at_once

    @property
    def counter(self) -> Counter:
        """Return what such a part has: one for hidden values of its experts."""
        return Counter(self.at_once * self.tiles, self.blocks)

    @property
    def steps(self) -> int:
        """Return how many groups of a row a lane takes of gate and up."""
        return self.groups // LANES

    @property
    def tiles(self) -> int:
        """Return how many tasks gate and up of a pair are."""
        return HIDDEN // GROUP

    @property
    def blocks(self) -> int:
        """Return how many blocks of rows the weights of down have."""
        return self.out // GROUP

    @property
    def gated_planes(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of half a task's gate, or up, and the bytes of each."""
        sizes = 4 * self.groups, 4 * self.groups, 2 * self.groups // BLOCK
        names = "grid", "signs", "d"
        return tuple((n, HALF * size) for n, size in zip(names, sizes, strict=True))

    @property
    def gated(self) -> int:
        """Return the bytes of half a task: its planes, each of gate before up's."""
        return 2 * sum(size for _, size in self.gated_planes)

    @property
    def shexp_planes(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of a block of the shared expert's down, and their bytes."""
        return ("quants", GROUP * HIDDEN), ("d", HIDDEN * 2)

    @property
    def shexp(self) -> int:
        """Return the bytes of that."""
        return sum(size for _, size in self.shexp_planes)

    @property
    def expert(self) -> int:
        """Return the bytes of a block of an expert's down."""
        return sum(size for _, size in self.down_planes)

    @property
    def down_planes(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of that, in their order, and the bytes of each."""
        sizes = HIDDEN // 4, HIDDEN // 16, HIDDEN // 128, HIDDEN // 128
        names = "quants", "scales", "d", "dmin"
        return tuple((n, GROUP * size) for n, size in zip(names, sizes, strict=True))

    @property
    def at_once(self) -> int:
        """Return how many experts of down are a task."""
        most = max(2 * self.gated, self.shexp) // self.expert
        return next(n for n in range(most, 0, -1) if self.each % n == 0)

    @property
    def slot(self) -> int:
        """Return the bytes of a task's weights at most."""
        return max(2 * self.gated, self.shexp, self.at_once * self.expert)

    @property
    def hidden(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of an expert's hidden values, and the bytes of each."""
        groups = HIDDEN // GROUP
        return (
            ("hidden_words", self.limbs * HIDDEN),
            ("hidden_scale", 4 * groups),
            ("hidden_sums", 8 * groups),
        )

    @property
    def stage(self) -> int:
        """Return the bytes of a task's hidden values."""
        return self.at_once * sum(size for _, size in self.hidden)

    @property
    def staged(self) -> int:
        """Return where in shared memory the hidden values of two tasks are."""
        return TABLE + 2 * self.slot

    @property
    def values(self) -> int:
        """Return where the values of two tasks of gate and up are exchanged."""
        return self.staged + 2 * self.stage

    @property
    def copied(self) -> int:
        """Return where the barriers are of tasks whose weights are there: by halves."""
        return self.values + 2 * GROUP * 4

    @property
    def settled(self) -> int:
        """Return where those are of tasks whose weights are multiplied."""
        return self.copied + 32

    @property
    def read(self) -> int:
        """Return where those are of tasks whose values are read."""
        return self.settled + 16

    @property
    def arrived(self) -> int:
        """Return where those are of tasks whose hidden values are there."""
        return self.read + 16

    @property
    def used(self) -> int:
        """Return where those are of tasks whose hidden values are multiplied."""
        return self.arrived + 16

    @property
    def barriers(self) -> list[tuple[int, int]]:
        """Return where barriers are, and how many warps or copies each waits for."""
        by_one = self.copied, self.copied + 16, self.read, self.arrived
        by_all = self.settled, self.used
        barriers = [(at, 1) for at in by_one] + [(at, WARPS) for at in by_all]
        return [(at + 8 * i, count) for at, count in barriers for i in range(2)]

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory."""
        return self.used + 16
