"""The text of `moe_ptx`'s programs, in PTX: how warps begin, and gate and up.

After the hyper connection's input a program takes a few of the router's logits and
tasks of the shared expert's gate and up; then task after task GROUP rows of an expert's
gate, the same of its up, and a row of activations; then, as `moe_down` has it, blocks
of rows of down.  A warp multiplies a few of those rows, a lane the same few groups of
each: it holds their activations in registers.  Each lane looks codes up in a bank of
shared memory of its own, where no other lane is in its way.
"""

from __future__ import annotations

from ds4jax.pallas import hc_program, moe_router
from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.down_arithmetic import EXPONENT
from ds4jax.pallas.iq2_arithmetic import activate, look_up, multiply, read
from ds4jax.pallas.moe_down import down
from ds4jax.pallas.moe_router import add_logits, load_router, load_row
from ds4jax.pallas.moe_service import first_task, next_task, service
from ds4jax.pallas.moe_shape import (
    BLOCK,
    EACH,
    ROWS,
    THREADS,
    WARPS,
    Shape,
)
from ds4jax.pallas.moe_shexp import multiply_gated
from ds4jax.pallas.ptx import LANES, add_up, begin, bind, divide, number, registers
from ds4jax.pallas.ptx_fixed_point import declare


def program(s: Shape) -> str:
    """Return the text of a program."""
    text = "{" + _start(s) + _fill_table() + hc_program.prologue(s.hc, s.place)
    text += "\n    mov.u32 own_row, 0;" + load_row(s) + add_logits(s)
    text += multiply_gated(s) + _gated(s) + down(s) + service(s)
    return bind(text, s.operands) + "\nEND:\n}"


def _start(s: Shape) -> str:
    """Declare registers, and have all on its way that is read first."""
    x, words = 8 * s.limbs * s.steps, 2 * s.steps
    text = declare(s.dtype) + moe_router.declare(s) + hc_program.declare(s.hc)
    text += f"""
    .reg .pred p, first, lower;
    .reg .b32 thread, lane, warp, shared, number, phase, bar, here, to, a, b, c, w;
    .reg .b32 pair, tile, block, stage, turn, end, own_row, own_half, row, expert;
    .reg .b32 before, chosen<{s.at_once}>, lane_table, positive, negative, exponent;
    .reg .b32 times, least, packed<2>, at, at_d, at_min, at_words;
    .reg .b32 at_scale, at_sums, flip<2>, code<8>, x<{x}>, m<{s.limbs}>, q<8>, w<4>;
    .reg .b32 grid<{words}>, signs<{words}>;
    .reg .b64 address, base;
    .reg .b16 half<4>;
    .reg .f32 d, f, g, scale<4>, sum<{ROWS}>, value<2>, product, minimum;
    .reg .f32 half_sum<4>, share<{s.at_once}>;"""
    text += begin()
    text += f"""
    setp.lt.u32 lower, lane, {LANES // 2};
    mov.b64 base, %shared;
    cvt.u32.u64 shared, base;
    mov.u32 block, %ctaid.x;
    mov.u32 number, 0;
    setp.ge.u32 p, warp, {WARPS};
    @p bra SERVICE;
    mov.u32 piece, %ctaid.x;"""
    text += load_router(s)
    text += f"""
    mov.b64 base, %table;
    mad.wide.u32 address, thread, 4, base;
    ld.global.nc.b32 w, [address];
    mad.wide.u32 address, lane, 8, base;
    ld.global.nc.v2.b32 {{positive, negative}}, [address+{4 * WARPS * LANES}];"""
    return text + hc_program.load(s.hc, s.place)


def _activations(s: Shape) -> str:
    """Load a lane's activations for `pair`, or the last one.

    Not through the read-only cache: other programs have just written them.
    """
    text = f"""
    min.u32 row, pair, {s.pairs - 1};
    div.u32 row, row, {s.each};
    mul.lo.u32 row, row, {s.groups};
    mad.lo.u32 b, lane, {s.steps}, row;
    mov.b64 base, %x_scale;
    mad.wide.u32 address, b, 4, base;
    ld.global.v{s.steps}.f32 {registers("scale", 0, s.steps)}, [address];
    mad.lo.u32 b, row, {8 * s.limbs - 1}, b;
    mov.b64 base, %x_words1;
    mad.wide.u32 address, b, 4, base;"""
    for word in range(8 * s.limbs):
        own = registers("x", word * s.steps, s.steps)
        text += f"""
    ld.global.v{s.steps}.b32 {own}, [address+{4 * word * s.groups}];"""
    return text


def _fill_table() -> str:
    """Fill the table: a thread has an entry, and writes it into every lane's bank."""
    text = f"""
    mad.lo.u32 a, thread, {4 * LANES}, shared;
    shl.b32 b, lane, 2;"""
    for place in range(0, 4 * LANES, 4):
        text += f"""
    xor.b32 c, b, {place};
    add.u32 c, c, a;
    st.shared.b32 [c], w;"""
    return text + f"\n    bar.sync 0, {THREADS};"


def _keep_apart(s: Shape) -> str:
    """Have no load done before what precedes it, if there are many registers to load.

    Three limbs of two tasks at once are more than a thread has.
    """
    return "\n    bar.warp.sync 0xffffffff;" if s.limbs == 3 else ""


def _gated(s: Shape) -> str:
    """Multiply task after task, and exchange values by two buffers in turn."""
    half = ROWS // 4
    rows = [
        row + which for row in (0, half) for which in (0, 1, 2 * half, 2 * half + 1)
    ]
    order = [(row, step) for row in rows for step in range(s.steps)]
    block = divide("a", "lane", BLOCK // s.steps)
    text = (
        """
    mad.lo.u32 lane_table, lane, 4, shared;"""
        + first_task(s)
        + _activations(s)
        + f"""
    setp.ge.u32 p, pair, {s.pairs};
    @p bra BLOCK;
GATED:"""
        + slots.wait_for_half(s, "GATED_HALF", 0)
        + f"""
    mad.lo.u32 at, warp, {4 * s.groups}, here;
    mad.lo.u32 at, lane, {4 * s.steps}, at;
    mad.lo.u32 at_d, warp, {2 * s.groups // BLOCK}, here;{block}
    mad.lo.u32 at_d, a, 2, at_d;"""
        + read(s, 0)
        + look_up(s, 0, *order[0])
    )
    for turn, (row, step) in enumerate(order):
        if step == 0 and row != rows[-1]:
            following = rows[rows.index(row) + 1]
            if following == half:
                text += slots.wait_for_half(s, "GATED_COPIED", 1)
            text += read(s, following)
        if turn + 1 < len(order):
            text += look_up(s, (turn + 1) % 2, *order[turn + 1])
        text += multiply(s, turn % 2, row, step)
    return (
        text
        + next_task(s)
        + _keep_apart(s)
        + _activations(s)
        + add_up(ROWS)
        # Weights were multiplied by eight times their scale, a whole number.
        + f"\n    mul.rn.f32 sum0, sum0, {number(1 / 8)};"
        + activate(s)
        + slots.wait_for("VALUES_READ", s.read, "number", 2)
        + f"""
    and.b32 a, number, 1;
    mad.lo.u32 b, a, {s.exchanged}, shared;{divide("c", "lane", EACH)}
    mad.lo.u32 c, c, {WARPS}, warp;
    mad.lo.u32 b, c, 4, b;
    and.b32 c, lane, {EACH - 1};
    setp.eq.and.u32 p, c, 0, lower;
    @p st.shared.f32 [b+{s.values}], sum0;"""
        + slots.tell(s.settled, "number")
        + f"""
    add.u32 number, number, 1;
    setp.lt.u32 p, pair, {s.pairs};
    @p bra GATED;
BLOCK:
    mov.b32 exponent, {EXPONENT};
    mov.u32 stage, 0;"""
    )
