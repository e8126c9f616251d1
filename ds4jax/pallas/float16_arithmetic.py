"""Products in float16, in PTX, for programs of which eight warps multiply.

A task is four rows of a weight for each warp, 512 columns of them: a lane has 16 of
each, as many bytes as a group has in Q8_0, and reads them as `q8_arithmetic` does.
"""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.ptx import LANES, number, registers
from ds4jax.pallas.ptx_fixed_point import round_all
from ds4jax.pallas.q8_arithmetic import ROWS, Kept, read_line, store_sums

COLUMNS = GROUP // 2
"""Of a lane."""

CHUNKS = COLUMNS // 4
"""Of 16 bytes, that they are as float32."""


def declare() -> str:
    """Declare the registers that are used here alone."""
    return f"""
    .reg .b16 low, high;
    .reg .f32 y<{COLUMNS}>, weight<{ROWS * COLUMNS}>;"""


class Floats(NamedTuple):
    """Rows of float32, of which a lane has the columns of a weight.

    Attributes:
      operand: where they are.
      columns: of a row.
      dtype: to which they are rounded.
    """

    operand: str
    columns: int
    dtype: str

    def find(self) -> str:
        """Find the addresses of a lane's columns of the first row."""
        return f"""
    mad.lo.u32 a, part, {LANES}, lane;
    mul.lo.u32 a, a, {COLUMNS};
    mov.b64 base, %{self.operand};
    mad.wide.u32 base, a, 4, base;
    mad.wide.u32 near, half, 2, base;
    xor.b32 a, half, {GROUP // 2};
    mad.wide.u32 far, a, 2, base;"""

    def load(self, row: int) -> str:
        """Load its columns of a row to registers `y`, rounded.

        Not through the read-only cache: other programs may just have written some.
        """
        text = ""
        for chunk in range(CHUNKS):
            base, at = ("near", chunk) if chunk < CHUNKS // 2 else ("far", chunk - 2)
            place = 4 * row * self.columns + 16 * at
            text += f"""
    ld.global.v4.f32 {registers("y", 4 * chunk, 4)}, [{base}+{place}];"""
        return text + round_all([f"y{i}" for i in range(COLUMNS)], self.dtype)


def stage(kept: Kept, x: Floats) -> str:
    """Bring a lane's columns to places of its own, of the rows that are kept."""
    text = x.find()
    for row in range(kept.rows):
        text += x.load(row)
        text += kept.store(row, CHUNKS, "f32", "y")
    return text


def read(row_bytes: int) -> str:
    """Read a lane's columns of a warp's rows of a weight, of so many bytes."""
    return "".join(read_line(line, row_bytes) for line in range(ROWS))


def convert() -> str:
    """Make numbers of them."""
    text = ""
    for word in range(ROWS * COLUMNS // 2):
        text += f"""
    mov.b32 {{low, high}}, w{word};
    cvt.f32.f16 weight{2 * word}, low;
    cvt.f32.f16 weight{2 * word + 1}, high;"""
    return text


def multiply(row: int, stride: int) -> str:
    """Multiply them by a row of activations, and leave each one's sum where it is due.

    That is so many bytes further on for each row of activations.
    """
    text = ""
    for line in range(ROWS):
        text += f"\n    mov.f32 sum{line}, {number(0.0)};"
    for column in range(COLUMNS):
        for line in range(ROWS):
            weight = f"weight{line * COLUMNS + column}"
            text += f"\n    fma.rn.f32 sum{line}, {weight}, y{column}, sum{line};"
    return text + store_sums(row, stride)
