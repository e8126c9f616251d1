"""Rows that `two_maps`' programs finish, in PTX: parts added up, and written.

A piece of the first map is put into fixed point, and counted for those who wait for it.
"""

from __future__ import annotations

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.ptx import add_shared, divide, store_row, wait
from ds4jax.pallas.ptx_fixed_point import APART, fix, store_words
from ds4jax.pallas.q8_arithmetic import COLUMNS, FINISHERS, MULTIPLIERS
from ds4jax.pallas.two_maps_shape import PIECE, Map, Shape


def finish_first(s: Shape) -> str:
    """Put the first map's pieces into fixed point, and tell who waits for them."""
    weight = s.maps[0]
    return (
        """
    sub.u32 last, end0, begin0;
    mov.u32 piece, 0;
FIXED:
    setp.ge.u32 p, piece, last;
    @p bra FIRST;"""
        + _await_sums(s, 0)
        + f"""
    add.u32 group, begin0, piece;
FIX:
    setp.ge.u32 p, row, {s.rows};
    @p bra NEXT;"""
        + _total(weight)
        + divide("a", "group", COLUMNS // PIECE)
        + f"""
    mov.b64 base, %counters;
    mad.wide.u32 address, a, {4 * APART}, base;"""
        + _fix_piece(s, "[address]")
        + _next_row(weight)
        + """
    bra FIX;
NEXT:
    add.u32 piece, piece, 1;
    bra FIXED;
FIRST:"""
    )


def _await_sums(s: Shape, number: int) -> str:
    """Wait for a piece's sums, and find a lane's of a warp's first row."""
    size = s.maps[number].parts * PIECE * 4
    return (
        "\n    mad.lo.u32 bar, piece, 8, shared;"
        + wait(f"SUMMED{number}", f"bar+{s.summed[number]}", "0")
        + f"""
    sub.u32 row, warp, {MULTIPLIERS + 1};
    mad.lo.u32 at, piece, {s.rows}, row;
    mad.lo.u32 at, at, {size}, shared;
    mad.lo.u32 at, lane, 4, at;
    add.u32 at, at, {s.values[number]};"""
    )


def _next_row(weight: Map) -> str:
    """Go on to a warp's next row."""
    return f"""
    add.u32 row, row, {FINISHERS};
    add.u32 at, at, {FINISHERS * weight.parts * PIECE * 4};"""


def finish_second(s: Shape) -> str:
    """Write the second map's rows, and copies of the last one computed."""
    weight = s.maps[1]
    text = (
        f"""
    mul.lo.u32 last, end1, {weight.lines};
    mul.lo.u32 task, begin1, {weight.lines};
    mov.u32 piece, 0;
WRITTEN:
    setp.ge.u32 p, task, last;
    @p bra END;"""
        + _await_sums(s, 1)
        + f"""
    add.u32 own, task, lane;
WRITE:
    setp.ge.u32 p, row, {s.rows};
    @p bra ON;
    setp.lt.u32 leads, own, last;"""
        + _total(weight)
        + f"""
    mad.lo.u32 a, row, {s.out}, own;
    mov.b64 base, %out;
    mad.wide.u32 address, a, 4, base;"""
    )
    text += store_row("f", "leads", "row", s.rows, s.written - s.rows, 4 * s.out)
    return (
        text
        + _next_row(weight)
        + f"""
    bra WRITE;
ON:
    add.u32 task, task, {PIECE};
    add.u32 piece, piece, 1;
    bra WRITTEN;"""
    )


def _total(weight: Map) -> str:
    """Leave a row's sum over all its parts, the first of which is at `at`, in `f`."""
    return add_shared("f", "g", "at", 0, weight.parts, PIECE * 4)


def _fix_piece(s: Shape, counter: str) -> str:
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
