"""The text of `iq2_gated`'s programs, in PTX: what they read, and when.

A program takes task after task: GROUP rows of an expert's gate, the same of its up, and
a row of activations.  A warp multiplies a few of those rows, a lane the same few groups
of each: it holds their activations in registers.  Each lane looks codes up in a bank of
shared memory of its own, where no other lane is in its way.
"""

from __future__ import annotations

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.iq2_arithmetic import (
    activate,
    add_up,
    finish,
    look_up,
    multiply,
    read,
)
from ds4jax.pallas.iq2_shape import (
    BLOCK,
    EACH,
    OPERANDS,
    ROWS,
    TABLE,
    WARPS,
    Shape,
)
from ds4jax.pallas.ptx import LANES, registers, wait


def program(s: Shape) -> str:
    """Return the text of a program."""
    text = "{" + _start(s) + _fill_table() + _loop(s) + "\n}"
    for number, name in enumerate(OPERANDS):
        text = text.replace(f"%{name};", f"${number};")
    return text


def _start(s: Shape) -> str:
    """Declare registers, and have all on its way that a program reads first.

    Task n of program p is pair `t % pairs` of tile `t / pairs`, t = p + n programs, so
    that those who read the same rows of an expert run together.
    """
    x, words = 8 * s.limbs * s.steps, 2 * s.steps
    return (
        f"""
    .reg .pred p, first, lower, copies, wraps, alone;
    .reg .b32 thread, lane, warp, shared, lane_table, number, phase, here, at, at_d;
    .reg .b32 pair, tile, next_pair, next_tile, old_pair, old_tile, expert, row, to;
    .reg .b32 bar, shift, a, b, c, positive, negative, x<{x}>, m<{s.limbs}>;
    .reg .b32 grid<{words}>, signs<{words}>, flip<2>, code<8>, w, times;
    .reg .b64 address, base;
    .reg .b16 half<2>;
    .reg .f32 d, f, g, scale<{s.steps}>, sum<{ROWS}>;
    mov.u32 thread, %tid.x;
    mov.u32 a, %tid.y;
    mov.u32 b, %ntid.x;
    mad.lo.u32 thread, a, b, thread;
    and.b32 lane, thread, {LANES - 1};
    div.u32 warp, thread, {LANES};
    setp.eq.u32 first, lane, 0;
    setp.lt.u32 lower, lane, {LANES // 2};
    mov.b64 base, %shared;
    cvt.u32.u64 shared, base;
    mov.u32 a, %ctaid.x;
    rem.u32 pair, a, {s.pairs};
    div.u32 tile, a, {s.pairs};
    setp.ge.u32 p, tile, {s.tiles};
    @p bra END;"""
        + _expert("pair")
        + f"""
    mov.b64 base, %table;
    mad.wide.u32 address, thread, 4, base;
    ld.global.nc.b32 w, [address];
    mad.wide.u32 address, lane, 8, base;
    ld.global.nc.v2.b32 {{positive, negative}}, [address+{4 * WARPS * LANES}];"""
        + _activations(s, "pair")
        + f"""
    setp.ne.u32 p, warp, 0;
    @p bra TABLE;
    @first mbarrier.init.shared::cta.b64 [shared+{s.copied}], 1;
    @first mbarrier.init.shared::cta.b64 [shared+{s.copied + 8}], 1;
    @first mbarrier.init.shared::cta.b64 [shared+{s.settled}], {WARPS};
    @first mbarrier.init.shared::cta.b64 [shared+{s.settled + 8}], {WARPS};
    @first fence.proxy.async.shared::cta;
    mov.u32 number, 0;"""
        + _copy(s, "pair", "tile")
    )


def _expert(pair: str) -> str:
    return f"""
    mov.b64 base, %ids;
    mad.wide.u32 address, {pair}, 4, base;
    ld.global.nc.b32 expert, [address];"""


def _activations(s: Shape, pair: str) -> str:
    """Load a lane's activations for a pair."""
    text = f"""
    div.u32 row, {pair}, {s.each};
    mul.lo.u32 row, row, {s.groups};
    mad.lo.u32 b, lane, {s.steps}, row;
    mov.b64 base, %scale;
    mad.wide.u32 address, b, 4, base;
    ld.global.nc.v{s.steps}.f32 {registers("scale", 0, s.steps)}, [address];
    mad.lo.u32 b, row, {8 * s.limbs - 1}, b;
    mov.b64 base, %words;
    mad.wide.u32 address, b, 4, base;"""
    for word in range(8 * s.limbs):
        own = registers("x", word * s.steps, s.steps)
        text += f"""
    ld.global.nc.v{s.steps}.b32 {own}, [address+{4 * word * s.groups}];"""
    return text


def _copy(s: Shape, pair: str, tile: str) -> str:
    """Have the first lane copy the weights of task `number`, if there is one."""
    copy = "@copies cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    text = f"""
    setp.lt.and.u32 copies, {tile}, {s.tiles}, first;
    and.b32 a, number, 1;
    mad.lo.u32 bar, a, 8, shared;
    add.u32 bar, bar, {s.copied};
    mad.lo.u32 to, a, {s.slot}, shared;
    add.u32 to, to, {TABLE};
    mul.lo.u32 a, {tile}, {GROUP};
    mad.lo.u32 a, expert, {s.out}, a;
    @copies mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {s.slot};"""
    for name, own in (
        ("grid", s.plane // 2),
        ("signs", s.plane // 2),
        ("d", s.slot // 2 - s.plane),
    ):
        for weight in ("gate", "up"):
            text += f"""
    mov.b64 base, %{weight}_{name};
    mad.wide.u32 address, a, {own // GROUP}, base;
    {copy} [to], [address], {own}, [bar];
    add.u32 to, to, {own};"""
    return text


def _fill_table() -> str:
    """Fill the table: a thread has an entry, and writes it into every lane's bank."""
    text = f"""
TABLE:
    mad.lo.u32 a, thread, {4 * LANES}, shared;
    shl.b32 b, lane, 2;"""
    for place in range(0, 4 * LANES, 4):
        text += f"""
    xor.b32 c, b, {place};
    add.u32 c, c, a;
    st.shared.b32 [c], w;"""
    return text + "\n    bar.sync 0;"


def _loop(s: Shape) -> str:
    """Multiply task after task.

    As a task begins, one warp has the next one's weights copied to where the last one's
    were, and writes what the last one found: values of two tasks are exchanged by two
    buffers in turn.  All have to have settled that task, and before they write another
    value: then who read the buffer before has done so.
    """
    order = [(row, step) for row in range(ROWS) for step in range(s.steps)]
    text = (
        f"""
    mad.lo.u32 lane_table, lane, 4, shared;
    mov.u32 number, 0;
LOOP:
    add.u32 next_pair, pair, {s.programs % s.pairs};
    add.u32 next_tile, tile, {s.programs // s.pairs};
    setp.ge.u32 wraps, next_pair, {s.pairs};
    @wraps sub.u32 next_pair, next_pair, {s.pairs};
    @wraps add.u32 next_tile, next_tile, 1;"""
        + _expert("next_pair")
        + f"""
    and.b32 a, number, 1;
    shr.u32 phase, number, 1;
    and.b32 phase, phase, 1;
    mad.lo.u32 bar, a, 8, shared;
    add.u32 bar, bar, {s.copied};
    mad.lo.u32 here, a, {s.slot}, shared;
    add.u32 here, here, {TABLE};
    mad.lo.u32 at, warp, {ROWS // 2 * s.groups * 4}, here;
    mad.lo.u32 at, lane, {4 * s.steps}, at;
    mad.lo.u32 at_d, warp, {ROWS // 2 * s.groups // BLOCK * 2}, here;
    div.u32 a, lane, {BLOCK // s.steps};
    mad.lo.u32 at_d, a, 2, at_d;"""
        + wait("COPIED", "bar", "phase")
        + f"""
    and.b32 a, number, {WARPS - 1};
    setp.ne.u32 p, a, warp;
    @p bra MULTIPLY;"""
        + _settle(s, "SETTLED")
        + """
    add.u32 number, number, 1;"""
        + _copy(s, "next_pair", "next_tile")
        + """
    sub.u32 number, number, 1;
    setp.eq.u32 p, number, 0;
    @p bra MULTIPLY;"""
        + finish(s)
        + "\nMULTIPLY:"
        + read(s, 0)
        + look_up(s, 0, *order[0])
    )
    for turn, (row, step) in enumerate(order):
        if step == 0 and row + 1 < ROWS:
            text += read(s, row + 1)
        if turn + 1 < len(order):
            text += look_up(s, (turn + 1) % 2, *order[turn + 1])
        text += multiply(s, turn % 2, row, step)
    return (
        text
        + f"""
    setp.lt.u32 p, next_tile, {s.tiles};
    selp.b32 a, next_pair, pair, p;"""
        + _activations(s, "a")
        + add_up()
        + activate(s)
        + _settle(s, "READ")
        + f"""
    and.b32 a, number, 1;
    mad.lo.u32 b, a, {4 * GROUP}, shared;
    div.u32 c, lane, {EACH};
    mad.lo.u32 c, warp, {ROWS // 2}, c;
    mad.lo.u32 b, c, 4, b;
    and.b32 c, lane, {EACH - 1};
    setp.eq.and.u32 p, c, 0, lower;
    @p st.shared.f32 [b+{s.values}], sum0;
    mad.lo.u32 b, a, 8, shared;
    bar.warp.sync 0xffffffff;
    @first mbarrier.arrive.shared::cta.b64 _, [b+{s.settled}];
    mov.u32 old_pair, pair;
    mov.u32 old_tile, tile;
    mov.u32 pair, next_pair;
    mov.u32 tile, next_tile;
    add.u32 number, number, 1;
    setp.lt.u32 p, tile, {s.tiles};
    @p bra LOOP;
    and.b32 a, number, {WARPS - 1};
    setp.ne.u32 p, a, warp;
    @p bra END;"""
        + _settle(s, "LAST")
        + finish(s)
        + "\nEND:"
    )


def _settle(s: Shape, label: str) -> str:
    """Wait until all warps have settled the task before this.

    Before the first there is nothing to wait for: a new barrier is in phase 0, not 1.
    """
    return f"""
    sub.u32 c, number, 1;
    and.b32 b, c, 1;
    mad.lo.u32 b, b, 8, shared;
    add.u32 b, b, {s.settled};
    shr.u32 c, c, 1;
    and.b32 c, c, 1;""" + wait(label, "b", "c")
