"""The text of `two_maps`' programs, in PTX: what they read, and when.

A program takes a run of the first weight's pieces, and then a run of the second's
tasks.  One warp has a task's weights copied to the next slot of a ring when nobody
needs what is there, across the border of the maps: the second's weights arrive while
programs wait for the middle.  Warps that multiply leave the sums of their parts of a
row in places of their own.  Others add the parts up, and put a piece of the first map
into fixed point or write one of the second.

Who has written a group of the middle adds one to the counter of its part of the second
weight's columns, and a warp that multiplies that part waits for all of its groups.
"""

from __future__ import annotations

from ds4jax.pallas import attend_program
from ds4jax.pallas.ptx import (
    Piece,
    arrive,
    begin,
    bind,
    divide,
    start_barriers,
    wait,
)
from ds4jax.pallas.ptx_fixed_point import APART, declare
from ds4jax.pallas.q8_arithmetic import (
    MULTIPLIERS,
    QUANTS,
    ROWS,
    SLOT,
    Activations,
    find_half,
    find_own,
    find_weights,
    multiply,
    part_warps,
    read,
    stage,
)
from ds4jax.pallas.two_maps_finish import finish_first, finish_second
from ds4jax.pallas.two_maps_shape import PIECE, Shape


def program(s: Shape) -> str:
    """Return the text of a program."""
    text = "{" + _start(s)
    if s.attention:
        text += attend_program.attend(s.attention, s.place)
    for number in range(2):
        text += _multiply_map(s, number)
    text += "\n    bra END;\nCOPY:"
    if s.attention:
        text += attend_program.await_loads(s.attention, s.place)
    text += _copy(s, 0) + _copy(s, 1)
    text += "\n    bra END;\nFINISH:" + finish_first(s) + finish_second(s)
    text += "\nEND:\n}"
    return bind(text, s.operands)


def _start(s: Shape) -> str:
    """Declare registers, set barriers up, and part the warps."""
    first, second = s.maps
    barriers = s.ring.counts
    for start, count in zip(s.summed, s.pieces, strict=True):
        barriers += [(start + 8 * piece, MULTIPLIERS) for piece in range(count)]
    text = declare(s.dtype)
    text += f"""
    .reg .pred p, first, leads;
    .reg .b32 thread, lane, warp, shared, begin<2>, end<2>, slot, phase, bar, here;
    .reg .b32 copies, old, old_phase;
    .reg .b32 task, piece, last, row, group, part, half, own, own_d, own_value, value;
    .reg .b32 at, other, at_d, at_x, at_scale, a, b, m<{s.limbs}>, w<{8 * ROWS}>;
    .reg .b32 x<{8 * s.limbs * max(s.kept_rows, 1)}>;
    .reg .b64 address, base, near, far;
    .reg .b16 d;
    .reg .f32 f, g, scale<{max(s.kept_rows, 1)}>, d<{ROWS}>, sum<{ROWS}>;"""
    text += attend_program.declare(s.attention) if s.attention else ""
    text += begin()
    text += """
    mov.b64 base, %shared;
    cvt.u32.u64 shared, base;
    mov.u32 a, %ctaid.x;
    add.u32 b, a, 1;"""
    text += _share("begin0", "a", first.rows // PIECE, s.programs)
    text += _share("end0", "b", first.rows // PIECE, s.programs)
    text += _share("begin1", "a", second.rows // second.lines, s.programs)
    text += _share("end1", "b", second.rows // second.lines, s.programs)
    text += f"""
    mov.u32 slot, 0;
    setp.ne.u32 p, warp, {MULTIPLIERS};
    @p bra READY;"""
    text += start_barriers(barriers)
    text += part_warps() + "\n    mov.u32 phase, 0;"
    return text + s.kept.own("thread") + find_half()


def _share(to: str, program: str, items: int, programs: int) -> str:
    """Find the first of a program's items, which are a run of all.

    The first programs have one more than others.
    """
    each, more = divmod(items, programs)
    return f"""
    min.u32 {to}, {program}, {more};
    mad.lo.u32 {to}, {program}, {each}, {to};"""


def _multiply_map(s: Shape, number: int) -> str:
    """Multiply a weight's tasks."""
    weight = s.maps[number]
    x = (
        Activations("words", "scale", s.columns, s.groups),
        Activations("middle_words", "middle_scale", s.middle, 1),
    )[number]
    text = (
        f"""
    sub.u32 last, end{number}, begin{number};
    mul.lo.u32 last, last, {weight.each if number == 0 else 1};
    setp.eq.u32 p, last, 0;
    @p bra MULTIPLIED{number};"""
        + find_own(weight.parts, weight.columns, QUANTS, 4 * PIECE, s.values[number])
        + (_await_middle(s, x) if number else "\n    mov.u32 group, 0xffffffff;")
        + f"""
    mov.u32 task, 0;
MULTIPLY{number}:"""
        + ("" if number else _change_group(s, x))
        + find_weights(SLOT)
        + f"""
    add.u32 at_d, here, own_d;
    and.b32 a, task, {weight.each - 1};
    mad.lo.u32 value, a, {weight.lines * 4}, own_value;"""
        + divide("piece", "task", weight.each)
        + f"""
    mad.lo.u32 value, piece, {s.rows * weight.parts * PIECE * 4}, value;"""
        + wait(f"COPIED{number}", f"bar+{s.ring.barriers}", "phase")
        + read(weight.columns)
        + arrive(s.ring.read)
        + s.ring.advance()
    )
    stride = weight.parts * PIECE * 4
    for row in range(s.rows):
        is_kept = row < s.kept.rows
        text += s.kept.read(row) if is_kept else x.load(s.limbs, row, 0)
        text += multiply(s.limbs, row, stride)
    return (
        text
        + f"""
    add.u32 task, task, 1;
    and.b32 a, task, {weight.each - 1};
    setp.eq.u32 p, a, 0;
    setp.eq.or.u32 p, task, last, p;
    @!p bra WITHIN{number};
    mad.lo.u32 bar, piece, 8, shared;"""
        + arrive(s.summed[number])
        + f"""
WITHIN{number}:
    setp.lt.u32 p, task, last;
    @p bra MULTIPLY{number};
MULTIPLIED{number}:"""
    )


def _change_group(s: Shape, x: Activations) -> str:
    """Bring the activations of a task's group, if others are there."""
    return (
        divide("a", "task", s.maps[0].each)
        + "\n    add.u32 a, a, begin0;"
        + divide("a", "a", s.middle // s.groups // PIECE)
        + """
    setp.eq.u32 p, a, group;
    @p bra STAGED;
    mov.u32 group, a;"""
        + stage(s.kept, x, s.limbs)
        + "\nSTAGED:"
    )


def _await_middle(s: Shape, x: Activations) -> str:
    """Wait until all groups of the middle are there that a warp multiplies."""
    return (
        f"""
    mov.b64 base, %counters;
    mad.wide.u32 address, part, {4 * APART}, base;"""
        + s.counter.wait("MIDDLE", "[address]")
        + "\n    mov.u32 group, 0;"
        + stage(s.kept, x, s.limbs)
    )


def _copy(s: Shape, number: int) -> str:
    """Have the first lane copy the weights of a map's tasks, as there is room."""
    weight = s.maps[number]
    each = weight.each if number == 0 else 1
    text = s.ring.start_copies() if number == 0 else ""
    text += f"""
    mul.lo.u32 task, begin{number}, {each};
    mul.lo.u32 last, end{number}, {each};
COPY{number}:
    setp.ge.u32 p, task, last;
    @p bra COPIES{number};"""
    sizes = ("quants", QUANTS), ("d", SLOT - QUANTS)
    pieces = [Piece(f"{weight.name}_{n}", "task", size, size) for n, size in sizes]
    return (
        text
        + s.ring.copy(f"{number}", pieces)
        + f"""
    add.u32 task, task, 1;
    bra COPY{number};
COPIES{number}:"""
    )
