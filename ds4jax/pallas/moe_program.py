"""The text of `moe_ptx`'s programs, in PTX: how warps begin, and gate and up.

After the hyper connection's input a program takes a few of the router's logits and
tasks of the shared expert's gate and up; then task after task GROUP rows of an expert's
gate, the same of its up, and a row of activations; then, as `moe_down` has it, blocks
of rows of down.  A warp multiplies some columns of all of those rows, on matrix units:
it holds their activations in registers.  Each lane looks codes up in a bank of shared
memory of its own, where no other lane is in its way.
"""

from __future__ import annotations

from ds4jax.pallas import hc_program, matrix_units, moe_router
from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.down_arithmetic import EXPONENT
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.iq2_arithmetic import TILES, find_groups, look_up, multiply, read
from ds4jax.pallas.matrix_units import LINES, PARTS
from ds4jax.pallas.moe_down import down
from ds4jax.pallas.moe_router import add_logits, load_router, load_row
from ds4jax.pallas.moe_service import first_task, next_task, service
from ds4jax.pallas.moe_shape import ROWS, THREADS, WARPS, Shape
from ds4jax.pallas.moe_shexp import multiply_gated
from ds4jax.pallas.ptx import LANES, add_up, begin, bind, registers
from ds4jax.pallas.ptx_fixed_point import declare


def program(s: Shape) -> str:
    """Return the text of a program."""
    text = "{" + _start(s) + _fill_table() + hc_program.prologue(s.hc, s.place)
    text += "\n    mov.u32 own_row, 0;" + load_row(s) + add_logits(s)
    text += multiply_gated(s) + _gated(s) + down(s) + service(s)
    return bind(text, s.operands) + "\nEND:\n}"


def _start(s: Shape) -> str:
    """Declare registers, and have all on its way that is read first."""
    x, words = 8 * s.limbs * s.steps, 4 * s.steps
    text = declare(s.dtype) + moe_router.declare(s) + hc_program.declare(s.hc)
    text += matrix_units.declare(s.limbs)
    text += f"""
    .reg .pred p, first;
    .reg .b32 thread, lane, warp, shared, number, phase, bar, here, to, a, b, c, w;
    .reg .b32 pair, tile, block, stage, turn, end, own_row, own_half, row, expert;
    .reg .b32 buffer, before, chosen<{s.at_once}>, lane_table, positive, negative;
    .reg .b32 exponent, times, least, packed<2>, at, at_d, at_min, at_words;
    .reg .b32 at_scale, at_sums, flip<4>, code<16>, x<{x}>, q<8>, w<16>;
    .reg .b32 grid<{words}>, signs<{words}>;
    .reg .b64 address, base;
    .reg .b16 half<4>;
    .reg .f32 d, f, g, scale<4>, sum<{ROWS}>, value<2>, product<2>, minimum<2>;
    .reg .f32 half_sum<4>, share<{s.at_once}>;"""
    text += begin() + matrix_units.find_place(s.limbs)
    text += f"""
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
    """Load the activations that a lane holds for `pair`, and scales, if not there yet.

    Not through the read-only cache: other programs have just written them.
    """
    text = f"""
    div.u32 row, pair, {s.each};
    setp.eq.u32 p, row, own_row;
    @p bra ACTIVATED;
    mov.u32 own_row, row;
    mul.lo.u32 row, row, {s.groups};
    mad.lo.u32 c, warp, {PARTS}, own_part;
    mul.lo.u32 c, c, {s.steps};
    add.u32 b, row, c;
    mov.b64 base, %x_scale;
    mad.wide.u32 address, b, 4, base;
    ld.global.v{s.steps}.f32 {registers("scale", 0, s.steps)}, [address];
    mad.lo.u32 a, row, {s.limbs}, c;
    mad.lo.u32 a, own_limb, {s.groups}, a;
    mov.b64 base, %x_words;
    mad.wide.u32 address, a, {GROUP}, base;"""
    for step in range(s.steps):
        for words in (0, 4):
            for i, (holds, limb) in enumerate(matrix_units.held(s.limbs)):
                own = registers("x", 8 * (i * s.steps + step) + words, 4)
                place = GROUP * (limb * s.groups + step) + 4 * words
                text += f"\n    @{holds} ld.global.v4.b32 {own}, [address+{place}];"
    text += "\nACTIVATED:"
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


def _gated(s: Shape) -> str:
    """Multiply task after task, and leave its values when those before are read."""
    order = [(tile, step) for tile in range(TILES) for step in range(s.steps)]
    text = (
        """
    mad.lo.u32 lane_table, lane, 4, shared;"""
        + matrix_units.clear(s.limbs, 8 * s.steps)
        + first_task(s)
        + f"""
    mov.u32 own_row, {s.rows};
    setp.ge.u32 p, pair, {s.pairs};
    @p bra BLOCK;
GATED:"""
        + _activations(s)
        + slots.wait_for_half(s, "GATED_HALF", 0)
        + find_groups(s)
        + read(s, 0)
        + look_up(s, 0, *order[0])
    )
    for turn, (tile, step) in enumerate(order):
        if step == 0 and tile + 1 < TILES:
            if tile + 1 == TILES // 2:
                text += slots.wait_for_half(s, "GATED_COPIED", 1)
            text += read(s, tile + 1)
        if turn + 1 < len(order):
            text += look_up(s, turn + 1, *order[turn + 1])
        text += multiply(s, turn, tile, step)
    return (
        text
        + next_task(s)
        + add_up(ROWS, PARTS)
        + slots.wait_for("VALUES_READ", s.read, "number", 1)
        + f"""
    mad.lo.u32 b, warp, {8 * GROUP}, shared;
    and.b32 a, own_line, 1;
    mad.lo.u32 b, a, {4 * GROUP}, b;
    shr.u32 a, own_line, 1;
    mad.lo.u32 a, own_part, {LINES}, a;
    mad.lo.u32 b, a, 4, b;
    st.shared.f32 [b+{s.values}], sum0;
    st.shared.f32 [b+{s.values + 2 * LINES}], sum1;"""
        + slots.tell(s.settled, "number")
        + f"""
    add.u32 number, number, 1;
    setp.lt.u32 p, pair, {s.pairs};
    @p bra GATED;
BLOCK:
    mov.b32 exponent, {EXPONENT};
    mov.u32 stage, 0;
    mov.u32 buffer, 0;"""
    )
