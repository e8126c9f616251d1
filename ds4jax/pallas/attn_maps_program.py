"""The text of `attn_maps`' programs, in PTX: what they read, and when.

Programs take the tasks of all weights in turn, those of the input's before those of the
queries' latent.  One warp has a task's weights copied to the next slot of a ring when
nobody needs what is there.  Warps that multiply leave the sums of their parts of a row
in places of their own, and others add the parts up.

Who has written a task of the latent counts it, and before the first weight that is for
the latent the warps that multiply wait for all of them.  The input's other weights,
which come between, are multiplied meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.pallas import float16_arithmetic, hc_program, latent, q8_arithmetic
from ds4jax.pallas.attn_maps_shape import (
    SUMS,
    Map,
    Shape,
)
from ds4jax.pallas.float16_arithmetic import CHUNKS, Floats
from ds4jax.pallas.ptx import (
    LANES,
    Piece,
    add_shared,
    arrive,
    begin,
    bind,
    start_barriers,
    store_row,
    wait,
)
from ds4jax.pallas.ptx_fixed_point import declare
from ds4jax.pallas.q8_arithmetic import (
    FINISHERS,
    MULTIPLIERS,
    ROWS,
    SLOT,
    Activations,
    find_half,
    find_own,
    find_weights,
    part_warps,
)


def program(s: Shape) -> str:
    """Return the text of a program."""
    text, awaited = "{" + _start(s), False
    for maps in s.kinds:
        if maps[0].is_second and not awaited:
            text += _await_latent(s, maps[0])
            awaited = True
        text += _multiply(s, maps)
    text += "\n    bra END;\nCOPY:" + s.ring.start_copies()
    text += "".join(_copy(s, m) for m in s.maps)
    text += f"""
    bra END;
FINISH:
    sub.u32 turn, warp, {MULTIPLIERS + 1};"""
    text += "".join(_finish(s, m) for m in s.maps)
    return bind(text + "\nEND:\n}", s.operands)


def _start(s: Shape) -> str:
    """Declare registers, set barriers up, and part the warps."""
    barriers = s.ring.counts
    barriers += [(s.summed + 8 * task, MULTIPLIERS) for task in range(s.tasks)]
    at_once = max(s.kept_rows, 1)
    text = declare(s.hc.dtype) + hc_program.declare(s.hc) + latent.declare(s.latent)
    text += float16_arithmetic.declare()
    text += f"""
    .reg .pred p, first, leads;
    .reg .b32 thread, lane, warp, shared, slot, phase, bar, here, number, turn;
    .reg .b32 copies, old, old_phase, task, row, group, part, half, own, own_d;
    .reg .b32 own_value, value, at, other, at_d, at_x, at_scale, a, b, c;
    .reg .b32 m<{s.limbs}>, w<{8 * ROWS}>, x<{8 * s.limbs * at_once}>;
    .reg .b64 address, base, near, far;
    .reg .b16 d;
    .reg .f32 f, g, scale<{at_once}>, d<{ROWS}>, sum<{LANES // 4}>;"""
    text += begin()
    text += f"""
    mov.b64 base, %shared;
    cvt.u32.u64 shared, base;
    mov.u32 slot, 0;
    mov.u32 number, 0;
    setp.ge.u32 p, warp, {MULTIPLIERS};
    @p bra OTHERS;"""
    text += hc_program.load(s.hc, s.place)
    text += f"""
    bra READY;
OTHERS:
    setp.ne.u32 p, warp, {MULTIPLIERS};
    @p bra READY;"""
    text += start_barriers(barriers)
    text += part_warps() + hc_program.prologue(s.hc, s.place)
    return (
        text
        + """
    mov.u32 phase, 0;
    mov.u32 group, 0;"""
        + find_half()
    )


def _first_task(s: Shape, m: Map) -> str:
    """Go on to a program's first task of a map, and those that follow it."""
    return f"""
    mov.u32 task, %ctaid.x;
    add.u32 task, task, {(s.programs - s.first(m)) % s.programs};
    setp.ge.u32 p, task, {s.programs};
    @p sub.u32 task, task, {s.programs};"""


def _each_task(s: Shape, label: str, maps: Sequence[Map], start: str, body: str) -> str:
    """Do something for a program's tasks of maps, which `number` counts.

    Args:
      s: what the program is made for.
      label: of what is done.
      maps: that follow each other.
      start: what is done before the first task, if there is one.
      body: what is done for each.
    """
    tasks, label = sum(m.tasks for m in maps), f"{label}_{maps[0].name}"
    return (
        _first_task(s, maps[0])
        + f"""
    setp.ge.u32 p, task, {tasks};
    @p bra {label}_ENDED;{start}
{label}:{body}
    add.u32 number, number, 1;
    add.u32 task, task, {s.programs};
    setp.lt.u32 p, task, {tasks};
    @p bra {label};
{label}_ENDED:"""
    )


def _await_latent(s: Shape, m: Map) -> str:
    """Wait until all of the latent is there, if it is needed, and norm it."""
    meet = s.place.meet(MULTIPLIERS)
    return (
        _first_task(s, m)
        + f"""
    setp.ge.u32 p, task, {s.seconds};
    @p bra LATENT_THERE;"""
        + latent.load_norm()
        + """
    setp.ne.u32 p, warp, 0;
    @p bra MEET;
    mov.b64 base, %counters;"""
        + s.counter.wait("LATENT", "[base]")
        + "\nMEET:"
        + meet
        + latent.keep(s.latent, s.maps[0].out, meet)
        + "\nLATENT_THERE:"
    )


def _multiply(s: Shape, maps: Sequence[Map]) -> str:
    """Multiply the tasks of maps of a kind."""
    m = maps[0]
    text = find_weights(SLOT)
    text += f"""
    mad.lo.u32 value, number, {s.rows * SUMS * 4}, own_value;"""
    if m.is_q8_0:
        text += "\n    add.u32 at_d, here, own_d;"
    text += wait(f"COPIED_{m.name}", f"bar+{s.ring.barriers}", "phase")
    done = arrive(s.ring.read) + s.ring.advance()
    if m.is_q8_0:
        start, rows = _fixed(s, m)
        text += q8_arithmetic.read(m.columns) + done
        for row, load in enumerate(rows):
            text += load + q8_arithmetic.multiply(s.limbs, row, SUMS * 4)
    else:
        start, rows = _floats(s, m)
        text += float16_arithmetic.read(m.row) + done + float16_arithmetic.convert()
        for row, load in enumerate(rows):
            text += load + float16_arithmetic.multiply(row, SUMS * 4)
    text += "\n    mad.lo.u32 bar, number, 8, shared;" + arrive(s.summed)
    own = find_own(m.parts, m.row, m.planes[0][1], 4 * m.lines, s.values)
    return _each_task(s, "MULTIPLY", maps, own + start, text)


def _fixed(s: Shape, m: Map) -> tuple[str, list[str]]:
    """Return what finds a map's activations in fixed point, and reads each row's."""
    if m.is_second:
        kept = s.latent.fixed
        return kept.own("lane"), [kept.read(row) for row in range(s.rows)]
    kept, x = s.kept, Activations("x_words", "x_scale", m.columns, 1)
    rows = [
        kept.read(row) if row < kept.rows else x.load(s.limbs, row, 0)
        for row in range(s.rows)
    ]
    return kept.own("thread") + q8_arithmetic.stage(kept, x, s.limbs), rows


def _floats(s: Shape, m: Map) -> tuple[str, list[str]]:
    """Return what finds a map's activations as numbers, and reads each row's."""
    if m.is_second:
        kept = s.latent.floats
        place = f"\n    mad.lo.u32 a, part, {LANES}, lane;"
        rows = [kept.load(row, CHUNKS, "f32", "y") for row in range(s.rows)]
        return place + kept.own("a"), rows
    kept, x = s.kept, Floats("x", m.columns, s.hc.dtype)
    rows = [
        kept.load(row, CHUNKS, "f32", "y") if row < kept.rows else x.load(row)
        for row in range(s.rows)
    ]
    return kept.own("thread") + float16_arithmetic.stage(kept, x), rows


def _copy(s: Shape, m: Map) -> str:
    """Have the first lane copy the weights of a map's tasks, as there is room."""
    pieces = [Piece(name, "task", size, size) for name, size in m.planes]
    return _each_task(s, "COPY", [m], "", s.ring.copy(f"_{m.name}", pieces))


def _finish(s: Shape, m: Map) -> str:
    """Write a map's rows, and copies of the last one computed."""
    copied = s.hc.copied_rows
    text = f"""
    setp.ne.u32 p, turn, 0;
    @p bra NOT_OWN_{m.name};
    mad.lo.u32 bar, number, 8, shared;"""
    text += wait(f"SUMMED_{m.name}", f"bar+{s.summed}", "0")
    text += f"""
    mul.lo.u32 at, number, {s.rows * SUMS * 4};
    add.u32 at, at, shared;
    min.u32 own, lane, {m.lines - 1};
    mad.lo.u32 at, own, 4, at;
    mad.lo.u32 own, task, {m.lines}, own;
    mov.b64 base, %{m.out};
    mad.wide.u32 address, own, 4, base;
    mov.u32 row, 0;
ROW_{m.name}:
    setp.lt.u32 leads, lane, {m.lines};"""
    text += add_shared("f", "g", "at", s.values, m.parts, m.lines * 4)
    text += store_row("f", "leads", "row", s.rows, copied, 4 * m.rows)
    text += f"""
    add.u32 at, at, {SUMS * 4};
    mad.wide.u32 address, {4 * m.rows}, 1, address;
    add.u32 row, row, 1;
    setp.lt.u32 p, row, {s.rows};
    @p bra ROW_{m.name};"""
    if m is s.maps[0]:
        text += "\n    mov.b64 base, %counters;" + s.counter.count("[base]")
    text += f"""
    mov.u32 turn, {FINISHERS};
NOT_OWN_{m.name}:
    sub.u32 turn, turn, 1;"""
    return _each_task(s, "FINISH", [m], "", text)
