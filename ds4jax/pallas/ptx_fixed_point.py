"""Fixed point in PTX, and how programs exchange it: counted when it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ds4jax.pallas.fixed_point import LIMBS, unit
from ds4jax.pallas.ptx import number

EXPONENT = "0x7F800000"
"""Bits of a number's power of two."""

LEAST = int(np.float32(2.0**-100).view(np.uint32))
"""Of a scale's: that of a group of zeros, or of numbers too small for another."""


def declare(dtype: str) -> str:
    """Declare the registers that are used here."""
    return f"""
    .reg .pred fourth;
    .reg .b16 narrow;
    .reg .b32 word<{LIMBS[dtype]}>, cut, byte, neighbour, place;
    .reg .f32 unit, units;"""


def fix(dtype: str) -> str:
    """Put a group's values, a lane's `f`, into fixed point as `fixed_point.store` does.

    Its scale is left in `unit`, and its words in `word0` to the last limb's, of every
    `fourth` lane.  Nothing is divided: a power of two's inverse follows from its bits.
    """
    text = round_all(["f"], dtype)
    limbs = LIMBS[dtype]
    text += f"""
    mov.b32 cut, f;
    and.b32 cut, cut, {EXPONENT};
    redux.sync.max.u32 cut, cut, 0xffffffff;
    max.u32 cut, cut, {LEAST};"""
    text += find_units(limbs, "cut")
    text += f"""
    mul.rn.f32 units, f, units;
    add.rn.f32 units, units, {number(0.5)};
    cvt.rmi.s32.f32 cut, units;
    and.b32 place, lane, 3;
    setp.eq.u32 fourth, place, 0;
    shl.b32 place, place, 3;"""
    for limb in reversed(range(limbs)):
        word = f"word{limb}"
        text += f"""
    bfe.s32 byte, cut, 0, 8;
    sub.u32 cut, cut, byte;
    shr.s32 cut, cut, 8;
    and.b32 byte, byte, 255;
    shl.b32 {word}, byte, place;
    shfl.sync.bfly.b32 neighbour, {word}, 1, 31, 0xffffffff;
    or.b32 {word}, {word}, neighbour;
    shfl.sync.bfly.b32 neighbour, {word}, 2, 31, 0xffffffff;
    or.b32 {word}, {word}, neighbour;"""
    return text


def round_all(values: Sequence[str], dtype: str) -> str:
    """Round values to what operands are."""
    if dtype == "float32":
        return ""
    return "".join(
        f"""
    cvt.rn.bf16.f32 narrow, {value};
    mov.b32 {value}, {{0, narrow}};"""
        for value in values
    )


def find_units(limbs: int, power: str) -> str:
    """Find a group's scale, `unit`, and its inverse, `units`, from its power of two.

    That is in a register, as bits, which are changed.
    """
    most = unit(limbs)
    inverse = (127 << 23) + int(np.float32(most).view(np.uint32))
    return f"""
    mov.b32 unit, {power};
    mul.rn.f32 unit, unit, {number(1 / most)};
    sub.u32 {power}, {inverse}, {power};
    mov.b32 units, {power};"""


def store_words(limbs: int, address: str, nbytes: int) -> str:
    """Write the words that `fix` left, of each limb so many bytes further on."""
    return "".join(
        f"\n    @fourth st.global.b32 [{address}+{limb * nbytes}], word{limb};"
        for limb in range(limbs)
    )


def dot(kind: str, words: Sequence[str], starts: Sequence[int]) -> str:
    """Multiply words by those of each limb; the first two become one number, `m0`.

    Args:
      kind: of the words' bytes.
      words: registers.
      starts: for each limb the number of the first of as many registers `x`.
    """
    text = ""
    for limb, start in enumerate(starts):
        text += f"\n    mov.b32 m{limb}, 0;"
        for i, word in enumerate(words, start):
            text += f"\n    dp4a.{kind}.s32 m{limb}, {word}, x{i}, m{limb};"
    return text + "\n    mad.lo.s32 m0, m0, 256, m1;"


def to_float(limbs: int, both: str = "m0", third: str = "m2") -> str:
    """Leave in `f` what registers are: of the first two limbs, and of the third."""
    text = f"\n    cvt.rn.f32.s32 f, {both};"
    if limbs == 3:
        text += f"""
    cvt.rn.f32.s32 g, {third};
    fma.rn.f32 f, f, {number(256.0)}, g;"""
    return text


APART = 32
"""Counters from one that programs use to the next: they ask different parts of L2."""


class Counter(NamedTuple):
    """A number in memory by which warps of all programs wait for each other.

    It is zero before a launch and after it, for it wraps when all have counted and
    waited: no launch has to set it.

    Attributes:
      counted: how often something is counted.
      awaited: how many warps wait for all of that.
    """

    counted: int
    awaited: int

    def count(self, at: str) -> str:
        """Count what the warp has written, by register `a`."""
        return f"""
    mov.u32 a, {self._last};
    bar.warp.sync 0xffffffff;
    @first red.release.gpu.global.inc.u32 {at}, a;"""

    def wait(self, label: str, at: str) -> str:
        """Wait until all has been counted, by registers `a` and `p`."""
        # No lane may find it wrapped already.
        return f"""
{label}:
    ld.acquire.gpu.global.u32 a, {at};
    setp.lt.u32 p, a, {self.counted};
    @p bra {label};
    mov.u32 a, {self._last};
    bar.warp.sync 0xffffffff;
    @first red.relaxed.gpu.global.inc.u32 {at}, a;"""

    @property
    def _last(self) -> int:
        """Return after which number it wraps."""
        return self.counted + self.awaited - 1
