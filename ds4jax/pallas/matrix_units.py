"""Products of bytes on matrix units, in PTX, in whole numbers: what `dp4a` gives.

Matrix units multiply a tile of 16 rows of weights and 32 columns by eight columns of
activations.  Of the tile a lane has words of two rows, LINES apart, and the PARTS lanes
that have the same rows each other columns.  Each of these parts has two columns of
activations to itself, for two limbs, with zeros where other parts' weights are.  So a
lane is left with products of what it had, a pair of each row, and scales them alone: a
whole tile's would lie in one lane of four, and have one scale.

Few lanes have activations that are not zero: the ones that hold a limb of a part's.  A
third limb takes products of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.pallas import ptx_fixed_point
from ds4jax.pallas.ptx import LANES, registers

PARTS = 4
"""Lanes that share rows, each with columns of its own."""

LINES = LANES // PARTS
"""From a lane's first row to its second."""


def declare(limbs: int) -> str:
    """Declare registers: products are in `m`, those with a third limb in `n`."""
    text = """
    .reg .pred holds;
    .reg .b32 own_line, own_part, own_limb, m<4>, zero;"""
    if limbs == 3:
        text += """
    .reg .pred holds_third;
    .reg .b32 n<4>;"""
    return text


def find_place(limbs: int) -> str:
    """Find a lane's first row, its part, and the limb that it holds, if it does."""
    text = f"""
    mov.b32 zero, 0;
    shr.u32 own_line, lane, {PARTS.bit_length() - 1};
    and.b32 own_part, lane, {PARTS - 1};
    and.b32 own_limb, own_line, 1;
    shr.u32 a, own_line, 1;
    setp.eq.u32 holds, a, own_part;"""
    if limbs == 3:
        text += "\n    setp.eq.and.u32 holds_third, own_limb, 0, holds;"
    return text


def held(limbs: int) -> list[tuple[str, int]]:
    """Return what limbs lanes hold: which lanes, and how far it is from `own_limb`."""
    return list(zip(("holds", "holds_third"), range(0, limbs, 2), strict=False))


def clear(limbs: int, words: int) -> str:
    """Leave zeros where lanes hold nothing: so many words, `x`, of each of `held`."""
    count = len(held(limbs)) * words
    return "".join(f"\n    mov.b32 x{i}, 0;" for i in range(count))


def multiply(kind: str, count: int, words: Sequence[int], x: Sequence[int]) -> str:
    """Multiply words of both of a lane's rows.

    The first row's products are left in `m0` and `m1`, of the first limb and of the
    second, the other's in `m2` and `m3`; with the third limb they are in `n0` and `n2`.

    Args:
      kind: of the words' bytes.
      count: of words of a row, an even number.
      words: for each row the number of its first register `w`.
      x: for each of `held` the number of the first of as many registers `x`.
    """
    text, mma = "", f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32"
    for name, start in zip("mn", x, strict=False):
        sums, so_far = registers(name, 0, 4), "{zero, zero, zero, zero}"
        for i in range(0, count, 2):
            a = ", ".join(f"w{row + i + half}" for half in range(2) for row in words)
            b = registers("x", start + i, 2)
            text += f"\n    {mma} {sums}, {{{a}}}, {b}, {so_far};"
            so_far = sums
    return text


def to_float(limbs: int, row: int) -> str:
    """Leave in `f` what a row's products are, all limbs', times the number `times`."""
    high, low, third = f"m{2 * row}", f"m{2 * row + 1}", f"n{2 * row}"
    text = f"""
    mad.lo.s32 {high}, {high}, 256, {low};
    mul.lo.s32 {high}, {high}, times;"""
    if limbs == 3:
        text += f"\n    mul.lo.s32 {third}, {third}, times;"
    return text + ptx_fixed_point.to_float(limbs, high, third)
