"""Products in Q8_0, in PTX, for programs of which eight warps multiply.

A task is four rows of a weight for each warp, 1024 columns of them: a lane has a group
of 32 of each.  Of lanes that follow each other four begin with the first half of theirs
and four with the second, so that eight loads of 16 bytes are of different banks.
"""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.ptx import LANES, add_up, divide, registers
from ds4jax.pallas.ptx_fixed_point import to_float

MULTIPLIERS = 8
"""Warps that multiply."""

MEETING = 1
"""The barrier at which these meet."""

THREADS = MULTIPLIERS * LANES
"""That multiply."""

ROWS = 4
"""Of a weight, that a warp multiplies for a task."""

COLUMNS = LANES * GROUP
"""Of a row of a weight, that a warp multiplies: a group for each lane, 32 bytes."""

QUANTS = MULTIPLIERS * ROWS * COLUMNS
"""Bytes of a task, but for `d`."""

SLOT = QUANTS + QUANTS // GROUP * 2
"""Bytes of a task: quants, then `d`."""

FINISHERS = 3
"""Warps that add parts up and finish rows; one more has weights copied."""

WARPS = MULTIPLIERS + 1 + FINISHERS


class Kept(NamedTuple):
    """Rows of activations in shared memory.

    Attributes:
      rows: how many of them there is room for, the first ones.
      chunks: of 16 bytes, that a place has of each.
      at: where they are: a chunk of each place in turn.
      at_scale: where their scales are.
      places: one for each thread that multiplies, or for lanes that have the same.
    """

    rows: int
    chunks: int
    at: int
    at_scale: int
    places: int = THREADS

    def own(self, place: str) -> str:
        """Find the first of a thread's chunks, `at_x`, and scales, `at_scale`."""
        return f"""
    mad.lo.u32 at_x, {place}, 16, shared;
    mad.lo.u32 at_scale, {place}, 4, shared;"""

    def chunk(self, row: int, number: int) -> str:
        """Return the address of one of a row."""
        place = 16 * self.places * (row * self.chunks + number)
        return f"[at_x+{self.at + place}]"

    def scale(self, row: int) -> str:
        """Return the address of a row's scale."""
        return f"[at_scale+{self.at_scale + 4 * self.places * row}]"

    def read(self, row: int) -> str:
        """Read a row in fixed point."""
        text = self.load(row, self.chunks, "b32", "x")
        return text + f"\n    ld.shared.f32 scale0, {self.scale(row)};"

    def load(self, row: int, count: int, kind: str, name: str) -> str:
        """Load so many chunks of a row to registers of a kind and a name."""
        text = ""
        for i in range(count):
            own = registers(name, 4 * i, 4)
            text += f"\n    ld.shared.v4.{kind} {own}, {self.chunk(row, i)};"
        return text

    def store(self, row: int, count: int, kind: str, name: str, first: int = 0) -> str:
        """Store registers, from a number on, as so many chunks of a row."""
        text = ""
        for i in range(count):
            own = registers(name, first + 4 * i, 4)
            text += f"\n    st.shared.v4.{kind} {self.chunk(row, i)}, {own};"
        return text


def kept_bytes(limbs: int) -> int:
    """Return how many bytes a row of all threads takes there."""
    return THREADS * (limbs * GROUP + 4)


def kept_rows(rows: int, limbs: int, room: int) -> int:
    """Return how many of some rows so many bytes have room for, beside two slots."""
    return max(min((room - 2 * (SLOT + 16)) // kept_bytes(limbs), rows), 0)


def kept_at(at: int, rows: int, limbs: int) -> Kept:
    """Return so many rows of all threads that are kept from a byte on."""
    return Kept(rows, 2 * limbs, at, at + rows * limbs * THREADS * GROUP)


def part_warps() -> str:
    """Have warps meet, and all go on elsewhere but those that multiply."""
    return f"""
READY:
    bar.sync 0, {WARPS * LANES};
    setp.eq.u32 p, warp, {MULTIPLIERS};
    @p bra COPY;
    setp.ge.u32 p, warp, {MULTIPLIERS};
    @p bra FINISH;"""


class Activations(NamedTuple):
    """Rows in fixed point.

    Attributes:
      words, scale: operands.
      columns: of each.
      each: how many a row has; of them, register `group` says which.
    """

    words: str
    scale: str
    columns: int
    each: int

    def find(self, limbs: int) -> str:
        """Find the addresses of a lane's part of the first row."""
        return f"""
    mad.lo.u32 a, part, {LANES}, lane;
    mad.lo.u32 b, group, {self.columns // GROUP}, a;
    mov.b64 base, %{self.scale};
    mad.wide.u32 address, b, 4, base;
    mad.lo.u32 b, group, {limbs * self.columns // GROUP}, a;
    mov.b64 base, %{self.words};
    mad.wide.u32 base, b, {GROUP}, base;
    mad.wide.u32 near, half, 1, base;
    xor.b32 a, half, {GROUP // 2};
    mad.wide.u32 far, a, 1, base;"""

    def load(self, limbs: int, row: int, first: int) -> str:
        """Load its part of a row to registers from `x` number `first` on.

        Not through the read-only cache: other programs have just written some.
        """
        text = ""
        for limb in range(limbs):
            x = first + 8 * limb
            place = (row * self.each * limbs + limb) * self.columns
            text += f"""
    ld.global.v4.b32 {registers("x", x, 4)}, [near+{place}];
    ld.global.v4.b32 {registers("x", x + 4, 4)}, [far+{place}];"""
        place = row * self.each * self.columns // GROUP * 4
        scale = f"scale{first // (8 * limbs)}"
        return text + f"\n    ld.global.f32 {scale}, [address+{place}];"


def stage(kept: Kept, x: Activations, limbs: int) -> str:
    """Bring a lane's activations to places of its own, of the rows that are kept."""
    text, words = x.find(limbs), 8 * limbs
    # All are on their way before one is needed.
    for row in range(kept.rows):
        text += x.load(limbs, row, row * words)
    for row in range(kept.rows):
        text += kept.store(row, kept.chunks, "b32", "x", row * words)
        text += f"\n    st.shared.f32 {kept.scale(row)}, scale{row};"
    return text


def find_half() -> str:
    """Find which half of its part a lane reads first, and if it leads a row's lanes."""
    return f"""
    and.b32 half, lane, 4;
    mul.lo.u32 half, half, {GROUP // 2 // 4};
    and.b32 a, lane, {LANES // ROWS - 1};
    setp.eq.u32 leads, a, 0;"""


def find_own(parts: int, row: int, quants: int, part_values: int, values: int) -> str:
    """Find a lane's places in a task's weights, and where its warp's sums are due.

    Args:
      parts: warps that a row takes.
      row: bytes of a row, but for `d`.
      quants: bytes of a task before `d`.
      part_values: bytes of the sums of a part.
      values: where sums are.
    """
    return (
        f"""
    and.b32 part, warp, {parts - 1};"""
        + divide("a", "warp", parts)
        + f"""
    mul.lo.u32 own, a, {ROWS * row};
    mad.lo.u32 own, part, {COLUMNS}, own;
    mad.lo.u32 own, lane, {GROUP}, own;"""
        + divide("own_d", "own", GROUP // 2)
        + f"""
    add.u32 own_d, own_d, {quants};
    add.u32 own, own, half;
    mul.lo.u32 own_value, a, {4 * ROWS};
    mad.lo.u32 own_value, part, {part_values}, own_value;"""
        + divide("a", "lane", LANES // ROWS)
        + f"""
    mad.lo.u32 own_value, a, 4, own_value;
    add.u32 own_value, own_value, shared;
    add.u32 own_value, own_value, {values};"""
    )


def find_weights(slot: int) -> str:
    """Find a lane's part of the task in register `slot`, one of so many bytes."""
    return f"""
    mad.lo.u32 bar, slot, 8, shared;
    mad.lo.u32 here, slot, {slot}, shared;
    add.u32 at, here, own;
    xor.b32 other, own, {GROUP // 2};
    add.u32 other, other, here;"""


def read_line(line: int, row: int) -> str:
    """Read both halves of a lane's part of one of a warp's rows, of so many bytes."""
    return f"""
    ld.shared.v4.b32 {registers("w", 8 * line, 4)}, [at+{line * row}];
    ld.shared.v4.b32 {registers("w", 8 * line + 4, 4)}, [other+{line * row}];"""


def read(columns: int) -> str:
    """Read a lane's groups of a warp's rows of a weight of so many columns."""
    text = ""
    for line in range(ROWS):
        text += read_line(line, columns)
        text += f"""
    ld.shared.b16 d, [at_d+{line * columns // GROUP * 2}];
    cvt.f32.f16 d{line}, d;"""
    return text


def multiply(limbs: int, row: int, stride: int) -> str:
    """Multiply them by a row of activations, and leave each one's sum where it is due.

    That is so many bytes further on for each row of activations.
    """
    text = ""
    for line in range(ROWS):
        for word in range(8):
            for limb in range(limbs):
                so_far = f"m{limb}" if word else "0"
                text += f"""
    dp4a.s32.s32 m{limb}, w{8 * line + word}, x{8 * limb + word}, {so_far};"""
        text += "\n    mad.lo.s32 m0, m0, 256, m1;" + to_float(limbs)
        text += f"""
    mul.rn.f32 g, d{line}, scale0;
    mul.rn.f32 sum{line}, f, g;"""
    return text + store_sums(row, stride)


def store_sums(row: int, stride: int) -> str:
    """Leave the sums of a warp's rows of a weight with a row of activations."""
    return add_up(ROWS) + f"\n    @leads st.shared.f32 [value+{row * stride}], sum0;"
