"""The queries' latent in `attn_maps`' programs, in PTX: normed, and kept for all warps.

Every program norms all of it for itself, a thread four channels of each row: that takes
less than to hear of it once more.  It lies in shared memory in the order in which lanes
read it, in fixed point for weights in Q8_0, and as numbers for those in float16.
"""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas import float16_arithmetic
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.float16_arithmetic import CHUNKS
from ds4jax.pallas.ptx import LANES, add_lanes, add_shared, divide, number, registers
from ds4jax.pallas.ptx_fixed_point import EXPONENT, LEAST, find_units, round_all
from ds4jax.pallas.q8_arithmetic import MULTIPLIERS, THREADS, Kept

WIDTH = 4 * THREADS
"""Channels: a word for each thread."""

_WORDS = GROUP // 4
"""Of a group."""


class Latent(NamedTuple):
    """What is known of it, and where in shared memory it is.

    Attributes:
      rows: that are computed.
      limbs: in fixed point.
      dtype: to which it is rounded.
      eps: of the RMS norm.
      at: where it is.
    """

    rows: int
    limbs: int
    dtype: str
    eps: float
    at: int

    @property
    def fixed(self) -> Kept:
        """Return where it is in fixed point: a place is a group."""
        scales = self.at + self.rows * self.limbs * WIDTH
        return Kept(self.rows, 2 * self.limbs, self.at, scales, LANES)

    @property
    def floats(self) -> Kept:
        """Return where the numbers are: a place is a lane's columns of a weight."""
        at = self.fixed.at_scale + self.rows * LANES * 4
        return Kept(self.rows, CHUNKS, at, at, WIDTH // float16_arithmetic.COLUMNS)

    @property
    def squares(self) -> int:
        """Return where the sums of squares are of each row and warp."""
        return self.floats.at + self.rows * WIDTH * 4

    @property
    def end(self) -> int:
        """Return where it ends."""
        return self.squares + self.rows * MULTIPLIERS * 4


def declare(latent: Latent) -> str:
    """Declare the registers that are used here alone."""
    return f"""
    .reg .b32 power, largest, cut<4>, pair<2>, at_words, at_floats, at_group;
    .reg .f32 v<{4 * latent.rows}>, norm<4>, inverse;"""


def load_norm() -> str:
    """Load a thread's channels of the norm's weight."""
    return f"""
    mov.b64 base, %latent_norm;
    mad.wide.u32 address, thread, 16, base;
    ld.global.nc.v4.f32 {registers("norm", 0, 4)}, [address];"""


def keep(latent: Latent, operand: str, meet: str) -> str:
    """Norm all rows of an operand and keep them.

    Args:
      latent: what is known of it.
      operand: its rows, of float32.
      meet: text by which the warps that multiply wait for each other.
    """
    text = f"""
    mov.b64 base, %{operand};
    mad.wide.u32 address, thread, 16, base;"""
    for row in range(latent.rows):
        own = registers("v", 4 * row, 4)
        text += f"\n    ld.global.v4.f32 {own}, [address+{4 * WIDTH * row}];"
    text += "\n    mad.lo.u32 at, warp, 4, shared;" + _find_places(latent)
    for row in range(latent.rows):
        text += _squares(row)
        place = latent.squares + 4 * MULTIPLIERS * row
        text += f"\n    @first st.shared.f32 [at+{place}], f;"
    text += meet
    for row in range(latent.rows):
        text += _norm(latent, row) + _store(latent, row)
    return text + meet


def _find_places(latent: Latent) -> str:
    """Find where a thread's word and numbers go.

    Of lanes that follow each other four read the other half of theirs first.
    """
    return (
        divide("a", "thread", _WORDS)
        + """
    mad.lo.u32 at_group, a, 4, shared;
    shr.u32 b, a, 2;
    shr.u32 other, thread, 2;
    xor.b32 b, b, other;
    and.b32 b, b, 1;"""
        + f"""
    mad.lo.u32 b, b, {LANES}, a;
    and.b32 other, thread, 3;
    mad.lo.u32 b, b, 4, other;
    mad.lo.u32 at_words, b, 4, shared;"""
        + divide("a", "thread", CHUNKS)
        + f"""
    and.b32 b, a, 4;
    shr.u32 b, b, 1;
    xor.b32 b, b, other;
    mad.lo.u32 b, b, {latent.floats.places}, a;
    mad.lo.u32 at_floats, b, 16, shared;"""
    )


def _squares(row: int) -> str:
    """Leave in `f` the sum of the squares of a warp's channels of a row."""
    text = f"\n    mul.rn.f32 f, v{4 * row}, v{4 * row};"
    for i in range(1, 4):
        text += f"\n    fma.rn.f32 f, v{4 * row + i}, v{4 * row + i}, f;"
    for bit in (1, 2, 4, 8, 16):
        text += add_lanes("f", "g", bit)
    return text


def _norm(latent: Latent, row: int) -> str:
    """Norm a thread's channels of a row, and round them."""
    place = latent.squares + 4 * MULTIPLIERS * row
    text = add_shared("f", "g", "shared", place, MULTIPLIERS, 4)
    text += f"""
    fma.rn.f32 f, f, {number(1 / WIDTH)}, {number(latent.eps)};
    sqrt.rn.f32 f, f;
    div.rn.f32 inverse, {number(1.0)}, f;"""
    values = [f"v{4 * row + i}" for i in range(4)]
    for i, value in enumerate(values):
        text += f"""
    mul.rn.f32 {value}, {value}, inverse;
    mul.rn.f32 {value}, {value}, norm{i};"""
    return text + round_all(values, latent.dtype)


def _store(latent: Latent, row: int) -> str:
    """Keep a thread's channels of a row, also as `fixed_point.store` has them."""
    fixed, floats, limbs = latent.fixed, latent.floats, latent.limbs
    values = [f"v{4 * row + i}" for i in range(4)]
    text = f"""
    st.shared.v4.f32 [at_floats+{floats.at + row * 4 * WIDTH}], {
        registers("v", 4 * row, 4)
    };
    mov.b32 largest, {LEAST};"""
    for value in values:
        text += f"""
    mov.b32 power, {value};
    and.b32 power, power, {EXPONENT};
    max.u32 largest, largest, power;"""
    for bit in (1, 2, 4):
        text += f"""
    shfl.sync.bfly.b32 power, largest, {bit}, 31, 0xffffffff;
    max.u32 largest, largest, power;"""
    text += find_units(limbs, "largest")
    text += f"""
    and.b32 a, thread, {_WORDS - 1};
    setp.eq.u32 p, a, 0;
    @p st.shared.f32 [at_group+{fixed.at_scale + row * LANES * 4}], unit;"""
    for i, value in enumerate(values):
        text += f"""
    mul.rn.f32 f, {value}, units;
    add.rn.f32 f, f, {number(0.5)};
    cvt.rmi.s32.f32 cut{i}, f;"""
    for limb in reversed(range(limbs)):
        place = fixed.at + (row * limbs + limb) * WIDTH
        text += f"""
    prmt.b32 pair0, cut0, cut1, 0x0040;
    prmt.b32 pair1, cut2, cut3, 0x0040;
    prmt.b32 pair0, pair0, pair1, 0x5410;
    st.shared.b32 [at_words+{place}], pair0;"""
        if limb:
            for i in range(4):
                text += f"""
    add.u32 cut{i}, cut{i}, 128;
    shr.s32 cut{i}, cut{i}, 8;"""
    return text
