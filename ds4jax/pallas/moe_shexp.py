"""Gate and up of the shared expert in `moe_ptx`'s programs, in PTX.

A task is a row of each for each warp, multiplied while programs wait for the router.
What the SwiGLU gives is put into fixed point once all of a group is there.
"""

from __future__ import annotations

from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.iq2_arithmetic import activate
from ds4jax.pallas.moe_shape import HIDDEN, WARPS, Shape
from ds4jax.pallas.ptx import LANES, add_product, add_up, divide, number, registers
from ds4jax.pallas.ptx_fixed_point import dot, fix, store_words, to_float


def multiply_gated(s: Shape) -> str:
    """Multiply task after task for all rows, and exchange values by two buffers."""
    start = """
    mov.u32 tile, %ctaid.x;
    and.b32 own_half, lane, 4;
    shl.b32 own_half, own_half, 2;"""
    task = (
        "\n    mov.u32 own_row, 0;"
        + _read_row(s)
        + slots.wait_for_weights(s, "SHEXP_GATED")
        + slots.wait_for("SHEXP_VALUES_READ", s.read, "number", 2)
        + "\nSHEXP_ROW:"
        + _multiply(s)
        + f"""
    mad.lo.u32 b, own_row, {WARPS}, warp;
    mad.lo.u32 b, b, 4, shared;
    and.b32 a, number, 1;
    mad.lo.u32 b, a, {s.exchanged}, b;
    @first st.shared.f32 [b+{s.values}], sum0;
    add.u32 own_row, own_row, 1;
    setp.ge.u32 p, own_row, {s.rows};
    @p bra SHEXP_TOLD;"""
        + _read_row(s)
        + """
    bra SHEXP_ROW;
SHEXP_TOLD:"""
        + slots.tell(s.settled, "number")
    )
    return start + slots.each_shexp_task(s, "SHEXP_TASK", task)


def _read_row(s: Shape) -> str:
    """Read a lane's groups of a row of activations: every LANES-th.

    Of lanes that follow each other four begin with the second half of each group.
    What is read here has just been written, as in `moe_program`.
    """
    width = s.groups * GROUP
    text = f"""
    mul.lo.u32 a, own_row, {s.limbs * width};
    mad.lo.u32 a, lane, {GROUP}, a;
    add.u32 b, a, own_half;
    xor.b32 c, own_half, {GROUP // 2};
    add.u32 c, a, c;
    mov.b64 base, %x_words;
    mad.wide.u32 address, b, 1, base;
    mad.wide.u32 base, c, 1, base;"""
    for limb in range(s.limbs):
        for step in range(s.steps):
            x = 8 * (limb * s.steps + step)
            place = limb * width + step * LANES * GROUP
            text += f"""
    ld.global.v4.b32 {registers("x", x, 4)}, [address+{place}];
    ld.global.v4.b32 {registers("x", x + 4, 4)}, [base+{place}];"""
    text += f"""
    mad.lo.u32 a, own_row, {s.groups}, lane;
    mov.b64 base, %x_scale;
    mad.wide.u32 address, a, 4, base;"""
    for step in range(s.steps):
        text += f"""
    ld.global.f32 scale{step}, [address+{4 * LANES * step}];"""
    return text


def _multiply(s: Shape) -> str:
    """Leave in `sum0` the SwiGLU of a warp's rows of gate and, multiplied first, up."""
    (_, quants), _ = s.shexp_gated_planes
    width = s.groups * GROUP
    text = f"""
    mad.lo.u32 at, warp, {width}, here;
    mad.lo.u32 at, lane, {GROUP}, at;
    xor.b32 a, own_half, {GROUP // 2};
    add.u32 at_words, at, a;
    add.u32 at, at, own_half;
    mad.lo.u32 at_d, warp, {2 * s.groups}, here;
    mad.lo.u32 at_d, lane, 2, at_d;
    mov.u32 turn, {s.shexp_gated};
    add.u32 at, at, turn;
    add.u32 at_words, at_words, turn;
    add.u32 at_d, at_d, turn;
    mov.f32 sum0, {number(0.0)};
SHEXP_UP_GATE:
    mov.f32 sum1, sum0;"""
    for step in range(s.steps):
        place = step * LANES * GROUP
        text += f"""
    ld.shared.v4.b32 {registers("q", 0, 4)}, [at+{place}];
    ld.shared.v4.b32 {registers("q", 4, 4)}, [at_words+{place}];
    ld.shared.b16 half0, [at_d+{quants + 2 * LANES * step}];"""
        starts = [8 * (limb * s.steps + step) for limb in range(s.limbs)]
        text += dot("s32", [f"q{i}" for i in range(8)], starts) + to_float(s.limbs)
        text += f"""
    cvt.f32.f16 d, half0;
    mul.rn.f32 d, d, scale{step};"""
        text += add_product("sum0", "f", "d", step == 0)
    text += """
    sub.u32 at, at, turn;
    sub.u32 at_words, at_words, turn;
    sub.u32 at_d, at_d, turn;
    setp.ne.u32 p, turn, 0;
    mov.u32 turn, 0;
    @p bra SHEXP_UP_GATE;"""
    text += add_up(2)
    text += f"\n    shfl.sync.down.b32 g, sum0, {LANES // 2}, 31, 0xffffffff;"
    return text + activate(s)


def write_gated(s: Shape) -> str:
    """Write the values of tasks, and count them for their group."""
    task = (
        slots.wait_for("SHEXP_FOUND", s.settled, "number")
        + f"""
    and.b32 a, number, 1;
    mad.lo.u32 a, a, {s.exchanged}, shared;
    and.b32 b, lane, {WARPS - 1};
    mad.lo.u32 a, b, 4, a;
    mad.lo.u32 b, tile, {WARPS}, b;
    mov.b64 base, %shexp_hidden;
    mad.wide.u32 address, b, 4, base;
    setp.lt.u32 p, lane, {WARPS};"""
        + "".join(
            f"""
    ld.shared.f32 f, [a+{s.values + 4 * WARPS * row}];
    @p st.global.f32 [address+{4 * HIDDEN * row}], f;"""
            for row in range(s.rows)
        )
        + slots.tell(s.read, "number")
        + divide("a", "tile", GROUP // WARPS)
        + """
    mov.b64 base, %counters;
    mad.wide.u32 address, a, 4, base;"""
        + s.made.count(f"[address+{s.at_made}]")
    )
    start = "\n    mov.u32 tile, %ctaid.x;"
    return start + slots.each_shexp_task(s, "WRITE_SHEXP", task)


def fix_hidden(s: Shape) -> str:
    """Put the shared expert's hidden values into fixed point, a group of all rows."""
    return (
        f"""
    mov.u32 tile, %ctaid.x;
FIX_SHEXP:
    setp.ge.u32 p, tile, {s.tiles};
    @p bra END;
    mov.b64 base, %counters;
    mad.wide.u32 address, tile, 4, base;"""
        + s.made.wait("SHEXP_GROUP", f"[address+{s.at_made}]")
        + f"""
    mov.u32 own_row, 0;
FIX_ROW:
    mad.lo.u32 a, own_row, {s.tiles}, tile;
    mad.lo.u32 b, a, {GROUP}, lane;
    mov.b64 base, %shexp_hidden;
    mad.wide.u32 address, b, 4, base;
    ld.global.f32 f, [address];
    mov.b64 base, %shexp_scale;
    mad.wide.u32 address, a, 4, base;"""
        + fix(s.dtype)
        + f"""
    @first st.global.f32 [address], unit;
    mul.lo.u32 a, own_row, {s.limbs * s.tiles};
    add.u32 a, a, tile;
    mad.lo.u32 a, a, {GROUP}, lane;
    mov.b64 base, %shexp_words;
    mad.wide.u32 address, a, 1, base;"""
        + store_words(s.limbs, "address", HIDDEN)
        + f"""
    add.u32 own_row, own_row, 1;
    setp.lt.u32 p, own_row, {s.rows};
    @p bra FIX_ROW;
    mov.b64 base, %counters;"""
        + s.fixed.count(f"[base+{s.at_fixed}]")
        + f"""
    add.u32 tile, tile, {s.programs};
    bra FIX_SHEXP;"""
    )
