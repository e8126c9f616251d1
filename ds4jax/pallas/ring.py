"""A ring of slots in a program's shared memory, in PTX: weights come, and are read.

One warp has a task's weights copied to the next slot when nobody needs what is there.
The warps that read them take the slots in the same order.  Each has registers `slot`
and `phase` of its own, zero at first, or as `start_copies` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ds4jax.pallas.ptx import Piece, copy, wait

AHEAD = 2
"""Tasks whose weights are on their way at a time.

With as many as there is room for, six, a value is there for others 12,000 cycles after
it is written, and both maps of attention's output take 21.5 us for 20.1; one is too few
for the memory, 22.1.
"""

FIRST = 1
"""As many until the ring is full, where programs tell each other something meanwhile.

On an H200 the input of a dense layer's attention takes 16.3 us, of HCA 17.3 and of CSA
23.6, with two 18.4, 18.9 and 25.3; attention and its output 26.3 for 27.8.
"""


class Ring(NamedTuple):
    """Where it is: slots from the first byte on.

    Attributes:
      slots: how many.
      nbytes: of each.
      barriers: where those are of weights that have arrived, then those of weights that
        nobody needs any more.
      readers: warps that read.
      first: tasks whose weights are on their way at a time until the ring is full.
    """

    slots: int
    nbytes: int
    barriers: int
    readers: int
    first: int = AHEAD

    @property
    def read(self) -> int:
        """Return where the barriers are of weights that nobody needs any more."""
        return self.barriers + self.slots * 8

    @property
    def end(self) -> int:
        """Return where the barriers end."""
        return self.read + self.slots * 8

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Return where the barriers are, and how many each waits for."""
        ones = [(self.barriers + 8 * slot, 1) for slot in range(self.slots)]
        return ones + [
            (self.read + 8 * slot, self.readers) for slot in range(self.slots)
        ]

    def advance(self) -> str:
        """Go on to the next slot."""
        return _advance("slot", "phase", self.slots)

    def start_copies(self) -> str:
        """Set the registers of the warp that has weights copied."""
        # Before the first round there is nothing to wait for: a new barrier is in
        # phase 0.
        return """
    mov.u32 phase, 1;
    mov.u32 copies, 0;
    mov.u32 old, 0;
    mov.u32 old_phase, 0;"""

    def copy(self, name: str, pieces: Sequence[Piece]) -> str:
        """Have the first lane copy a task's weights to the next slot, as there is room.

        No more than AHEAD are on their way: what else a multiprocessor asks memory for
        is queued behind them.

        Args:
          name: for labels.
          pieces: as of `ptx.copy`.
        """
        text = f"""
    mad.lo.u32 bar, slot, 8, shared;
    mad.lo.u32 here, slot, {self.nbytes}, shared;"""
        text += wait(f"READ{name}", f"bar+{self.read}", "phase")
        text += f"""
    setp.lt.u32 p, copies, {self.first};
    @p bra AHEAD{name};"""
        if more := AHEAD - self.first:
            text += f"""
    sub.u32 a, copies, {self.slots};
    setp.lt.u32 p, a, {more};
    @p bra AHEAD{name};"""
        text += """
    mad.lo.u32 other, old, 8, shared;"""
        text += wait(f"ARRIVED{name}", f"other+{self.barriers}", "old_phase")
        text += _advance("old", "old_phase", self.slots)
        text += f"""
AHEAD{name}:
    add.u32 copies, copies, 1;
    add.u32 bar, bar, {self.barriers};"""
        return text + copy("here", pieces) + self.advance()


def _advance(slot: str, phase: str, slots: int) -> str:
    return f"""
    add.u32 {slot}, {slot}, 1;
    setp.eq.u32 p, {slot}, {slots};
    @p mov.u32 {slot}, 0;
    @p xor.b32 {phase}, {phase}, 1;"""
