"""What `two_maps`' programs compute in PTX: products in Q8_0, and their fixed point.

A lane has a group of 32 columns of each of a warp's rows.  Of lanes that follow each
other four begin with the first half of theirs and four with the second, so that eight
loads of 16 bytes are of different banks.
"""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.ptx import LANES, add_up, registers
from ds4jax.pallas.ptx_fixed_point import fix, store_words, to_float
from ds4jax.pallas.two_maps_shape import PIECE, ROWS, THREADS, Map, Shape


class Activations(NamedTuple):
    """What a weight is multiplied by.

    Attributes:
      words, scale: operands.
      columns: of each.
      each: how many a row has; of them, register `group` says which.
    """

    words: str
    scale: str
    columns: int
    each: int

    def load(self, s: Shape, row: int, first: int) -> str:
        """Load a lane's part of a row to registers from `x` number `first` on.

        Not through the read-only cache: other programs have just written some.
        """
        text = ""
        for limb in range(s.limbs):
            x = first + 8 * limb
            place = (row * self.each * s.limbs + limb) * self.columns
            text += f"""
    ld.global.v4.b32 {registers("x", x, 4)}, [near+{place}];
    ld.global.v4.b32 {registers("x", x + 4, 4)}, [far+{place}];"""
        place = row * self.each * self.columns // GROUP * 4
        scale = f"scale{first // (8 * s.limbs)}"
        return text + f"\n    ld.global.f32 {scale}, [address+{place}];"


def stage(s: Shape, x: Activations) -> str:
    """Bring a lane's activations to places of its own, of the rows that are kept."""
    words = 8 * s.limbs
    text = f"""
    mad.lo.u32 a, part, {LANES}, lane;
    mad.lo.u32 b, group, {x.columns // GROUP}, a;
    mov.b64 base, %{x.scale};
    mad.wide.u32 address, b, 4, base;
    mad.lo.u32 b, group, {s.limbs * x.columns // GROUP}, a;
    mov.b64 base, %{x.words};
    mad.wide.u32 base, b, {GROUP}, base;
    mad.wide.u32 near, half, 1, base;
    xor.b32 a, half, {GROUP // 2};
    mad.wide.u32 far, a, 1, base;"""
    # All are on their way before one is needed.
    for row in range(s.kept):
        text += x.load(s, row, row * words)
    for row in range(s.kept):
        for chunk in range(2 * s.limbs):
            text += f"""
    st.shared.v4.b32 {_staged(s, row, chunk)}, {
                registers("x", row * words + 4 * chunk, 4)
            };"""
        text += f"\n    st.shared.f32 {_staged_scale(s, row)}, scale{row};"
    return text


def _staged(s: Shape, row: int, chunk: int) -> str:
    return f"[at_x+{s.staged + 16 * THREADS * (row * 2 * s.limbs + chunk)}]"


def _staged_scale(s: Shape, row: int) -> str:
    return f"[at_scale+{s.staged_scale + 4 * THREADS * row}]"


def read(weight: Map) -> str:
    """Read a lane's groups of a warp's rows of a weight."""
    text = ""
    for line in range(ROWS):
        place = line * weight.columns
        text += f"""
    ld.shared.v4.b32 {registers("w", 8 * line, 4)}, [at+{place}];
    ld.shared.v4.b32 {registers("w", 8 * line + 4, 4)}, [other+{place}];
    ld.shared.b16 d, [at_d+{place // GROUP * 2}];
    cvt.f32.f16 d{line}, d;"""
    return text


def multiply(s: Shape, weight: Map, x: Activations, row: int) -> str:
    """Multiply them by a row of activations, and leave each one's sum where it is due.

    A piece's sums are by rows of activations, parts and rows of the weight.
    """
    text = ""
    if row < s.kept:
        for chunk in range(2 * s.limbs):
            text += f"""
    ld.shared.v4.b32 {registers("x", 4 * chunk, 4)}, {_staged(s, row, chunk)};"""
        text += f"\n    ld.shared.f32 scale0, {_staged_scale(s, row)};"
    else:
        text += x.load(s, row, 0)
    for line in range(ROWS):
        for word in range(8):
            for limb in range(s.limbs):
                so_far = f"m{limb}" if word else "0"
                text += f"""
    dp4a.s32.s32 m{limb}, w{8 * line + word}, x{8 * limb + word}, {so_far};"""
        text += "\n    mad.lo.s32 m0, m0, 256, m1;" + to_float(s.limbs)
        text += f"""
    mul.f32 g, d{line}, scale0;
    mul.f32 sum{line}, f, g;"""
    return (
        text
        + add_up(ROWS)
        + f"""
    @leads st.shared.f32 [value+{row * weight.parts * PIECE * 4}], sum0;"""
    )


def total(weight: Map) -> str:
    """Leave a row's sum over all its parts, the first of which is at `at`, in `f`."""
    text = "\n    ld.shared.f32 f, [at];"
    for part in range(1, weight.parts):
        text += f"""
    ld.shared.f32 g, [at+{part * PIECE * 4}];
    add.f32 f, f, g;"""
    return text


def finish(s: Shape, counter: str) -> str:
    """Write a group of the middle, `f` of each lane, and count it."""
    text = fix(s.dtype)
    text += f"""
    mad.lo.u32 a, row, {s.middle // GROUP}, group;
    mov.b64 base, %middle_scale;
    mad.wide.u32 near, a, 4, base;
    mul.lo.u32 a, row, {s.limbs * s.middle // GROUP};
    add.u32 a, a, group;
    mov.b64 base, %middle_words;
    mad.wide.u32 far, a, {GROUP}, base;
    mad.wide.u32 far, lane, 1, far;"""
    text += store_words(s.limbs, "far", s.middle)
    return text + "\n    @first st.global.f32 [near], unit;" + s.counter.count(counter)
