"""What the programs of `moe_ptx` are made for, and how memory is shared out."""

from __future__ import annotations

from typing import NamedTuple

from jax.experimental import pallas as pl

from ds4jax.pallas import hc_shape
from ds4jax.pallas.fixed_point import GROUP, LIMBS, Order
from ds4jax.pallas.matrix_units import LINES
from ds4jax.pallas.ptx import LANES, Place
from ds4jax.pallas.ptx_fixed_point import APART, Counter

_READ = (
    "router", "bias_or_ids", "table", "gate_grid", "gate_signs", "gate_d", "up_grid",
    "up_signs", "up_d", "quants", "scales", "d", "dmin", "shexp_gate_quants",
    "shexp_gate_d", "shexp_up_quants", "shexp_up_d", "shexp_quants", "shexp_d",
    "counters",
)  # fmt: skip
_WRITTEN = (
    "keys", "probabilities", "shexp_hidden", "shexp_words", "shexp_scale",
    "hidden_words", "hidden_scale", "hidden_sums", "ids", "to_shexp", "to_routed",
)  # fmt: skip
"""Names of operands besides the hyper connection's.

`shexp` is the shared expert, as in GGUF.
"""

WARPS = 8
"""Of a program, that multiply: a thread for each entry of the table.

As many as LINES, so that a row has as many parts as a warp has lanes.
"""

SERVICE = 4
"""Warps that serve those: the first has weights copied, the others choose experts."""

CHOOSERS = SERVICE - 1

THREADS = (WARPS + SERVICE) * LANES
"""Of a program."""

BLOCK = 8
"""Groups that share a `d`."""

ROWS = 2 * GROUP // LINES
"""Of a task of gate and up that a lane multiplies: a part of each."""

HALF = GROUP // 2
"""Rows of gate, of up, and of the shared expert's down, that are copied together."""

SKEW = 64
"""Bytes between gate and up, and after them: half of the banks of shared memory."""

DOWN_ROWS = GROUP // WARPS
"""Of a block of down that a lane has sums of.

Of the shared expert's those of its warp; of the others' every LINES-th, a part of each.
"""

TABLE = WARPS * LANES * LANES * 4
"""Bytes of the table."""

HIDDEN = 2048
"""Hidden values of an expert: for each part a chunk of 64, in Q2_K 16 bytes."""

ORDER = Order(levels=4)
"""Of the routed experts' hidden values, as Q2_K is read."""


LOGITS = 2
"""Of experts, that a program computes together."""


class Routing(NamedTuple):
    """How rows choose experts.

    Attributes:
      experts: to choose from.
      hashed: whether the choice is known, so that only the shares are not.
      scale: of the shares.
      smallest: the least total that they are divided by.
    """

    experts: int
    hashed: bool
    scale: float
    smallest: float


class Shape(NamedTuple):
    """What a program is made for.

    Attributes:
      rows: to compute.
      copied_rows: whose results are copies of the last one's.
      each: experts of a row.
      routing: how it chooses them.
      groups: of a row, of the activations and of gate and up.
      out: rows of a weight of down.
      dtype: of operands.
      limit: of the SwiGLU.
      programs: that run side by side.
      hc: the reading of the streams that comes first.
    """

    rows: int
    copied_rows: int
    each: int
    routing: Routing
    groups: int
    out: int
    dtype: str
    limit: float
    programs: int
    hc: hc_shape.Shape

    @property
    def operands(self) -> tuple[str, ...]:
        """Return what a program is given addresses of: `%name` in the text, then `$i`.

        The last is shared memory.
        """
        read, written = self.hc.read_operands, self.hc.written_operands
        return *read, *_READ, *written, *_WRITTEN, "shared"

    @property
    def place(self) -> Place:
        """Return where that has room for what programs share."""
        return Place(self.added + 8 * self.pieces, self.at_hc, barrier=2)

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
    def routed(self) -> Counter:
        """Return what counts experts' probabilities: the first one."""
        return Counter(self.routing.experts // LOGITS, self.programs * self.rows)

    @property
    def made(self) -> Counter:
        """Return what counts tasks of a group of the shared expert's hidden values."""
        return Counter(GROUP // WARPS, 1)

    @property
    def fixed(self) -> Counter:
        """Return what counts groups of those that are in fixed point."""
        return Counter(self.tiles, min(self.blocks, self.programs))

    @property
    def finished(self) -> Counter:
        """Return what counts tasks of the hidden values that a part needs."""
        return Counter(self.at_once * self.tiles, self.blocks)

    @property
    def counters(self) -> int:
        """Return how many counters there are: those, and the hyper connection's."""
        return self.at_hc // 4 + self.hc.counters

    @property
    def at_made(self) -> int:
        """Return how many bytes after the first counter those of groups begin."""
        return 4

    @property
    def at_fixed(self) -> int:
        """Return how many bytes after it the counter of all groups is."""
        return self.at_made + 4 * self.tiles

    @property
    def at_finished(self) -> int:
        """Return how many bytes after it those of the parts begin."""
        return self.at_fixed + 4

    @property
    def at_hc(self) -> int:
        """Return how many bytes after it those of the hyper connection begin."""
        apart = 4 * APART
        return pl.cdiv(self.at_finished + 4 * self.parts, apart) * apart

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
        """Return the bytes of half a task: gate's planes and up's, SKEW after each."""
        return 2 * (sum(size for _, size in self.gated_planes) + SKEW)

    @property
    def shexp_gated_planes(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of a task's gate of the shared expert, or up."""
        return ("quants", WARPS * self.groups * GROUP), ("d", WARPS * self.groups * 2)

    @property
    def shexp_gated(self) -> int:
        """Return the bytes of a task's gate, after which up comes."""
        return sum(size for _, size in self.shexp_gated_planes)

    @property
    def shexp_tasks(self) -> int:
        """Return how many such tasks there are, of a row of each for each warp."""
        return HIDDEN // WARPS

    @property
    def shexp_planes(self) -> tuple[tuple[str, int], ...]:
        """Return the planes of a block of the shared expert's down, and their bytes.

        The larger one comes last, for of that a half is copied with what is before it.
        """
        return ("d", HIDDEN * 2), ("quants", GROUP * HIDDEN)

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
        gated = 2 * max(self.gated, self.shexp_gated)
        return max(gated, self.shexp, self.at_once * self.expert)

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
        """Return where warps exchange values, by two buffers in turn.

        What they have of a task of the routed experts' gate and up takes both.
        """
        return self.staged + 2 * self.stage

    @property
    def exchanged(self) -> int:
        """Return the bytes of one: of each warp GROUP values, more than rows are."""
        return 4 * WARPS * GROUP

    @property
    def logits(self) -> int:
        """Return where warps' parts of the router's logits are."""
        return self.values + 2 * self.exchanged

    @property
    def logits_each(self) -> int:
        """Return the bytes of those of experts that are computed together."""
        return self.rows * LOGITS * WARPS * 4

    @property
    def pieces(self) -> int:
        """Return how many times LOGITS experts a program has at most."""
        return pl.cdiv(self.routing.experts // LOGITS, self.programs)

    @property
    def chosen(self) -> int:
        """Return where the experts of all rows are."""
        return self.logits + self.pieces * self.logits_each

    @property
    def shares(self) -> int:
        """Return where their shares are."""
        return self.chosen + 4 * self.pairs

    @property
    def copied(self) -> int:
        """Return where the barriers are of tasks whose weights are there: by halves."""
        return self.shares + 4 * self.pairs

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
    def shexp_fixed(self) -> int:
        """Return where that is of the shared expert's hidden values."""
        return self.used + 16

    @property
    def weighed(self) -> int:
        """Return where that is of the shares."""
        return self.shexp_fixed + 8

    @property
    def added(self) -> int:
        """Return where those are of parts of logits."""
        return self.weighed + 8

    @property
    def barriers(self) -> list[tuple[int, int]]:
        """Return where barriers are, and how many warps or copies each waits for."""
        by_one = self.copied, self.copied + 16, self.read, self.arrived
        by_all = self.settled, self.used
        barriers = [(at, 1) for at in by_one] + [(at, WARPS) for at in by_all]
        pairs = [(at + 8 * i, count) for at, count in barriers for i in range(2)]
        added = [(self.added + 8 * i, WARPS) for i in range(self.pieces)]
        return [*pairs, (self.shexp_fixed, 1), (self.weighed, CHOOSERS), *added]

    @property
    def shared(self) -> int:
        """Return the bytes of shared memory."""
        return self.place.shared + self.hc.shared
