"""What `moe_ptx`'s programs compute of gate and up, in PTX: products, their SwiGLU.

Nothing is converted: codes and signs are nibbles by which `prmt` picks four weights.
"""

from __future__ import annotations

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.moe_shape import HALF, ORDER, ROWS, WARPS, Shape
from ds4jax.pallas.moe_slots import tell
from ds4jax.pallas.ptx import LANES, add_lanes, divide, exponential, number, registers
from ds4jax.pallas.ptx_fixed_point import fix, store_words


def read(s: Shape, row: int) -> str:
    """Read a lane's groups of a row."""
    (_, grid), (_, signs), (_, d) = s.gated_planes
    which, line = divmod(row, ROWS // 2)
    half, line = divmod(line, ROWS // 4)
    line = which * HALF + line * WARPS
    own, first = row % 2, row % 2 * s.steps
    words, flips = (registers(name, first, s.steps) for name in ("grid", "signs"))
    at = half * s.gated + line * s.groups * 4
    at_d = half * s.gated + 2 * (grid + signs) + line * (d // HALF)
    return f"""
    ld.shared.v{s.steps}.b32 {words}, [at+{at}];
    ld.shared.v{s.steps}.b32 {flips}, [at+{at + 2 * grid}];
    ld.shared.b16 half{own}, [at_d+{at_d}];"""


def look_up(s: Shape, own: int, row: int, step: int) -> str:
    """Look the codes of a group's weights up, and bring their signs into order.

    Bit j of nibble i of `flip` is then the sign of weight i of row j of the grid.
    """
    group = row % 2 * s.steps + step
    text = f"""
    and.b32 a, signs{group}, 0x0FFFFFFF;
    shl.b32 b, signs{group}, 4;
    xor.b32 flip{own}, a, b;"""
    for j in range(4):
        text += f"""
    prmt.b32 a, grid{group}, 0, 0x444{j};
    mad.lo.u32 a, a, {4 * LANES}, lane_table;
    ld.shared.b32 code{4 * own + j}, [a];"""
    return text


def multiply(s: Shape, own: int, row: int, step: int) -> str:
    """Add the product of a group to the sum of its row."""
    text = "".join(f"\n    mov.b32 m{limb}, 0;" for limb in range(s.limbs))
    for j, shift in enumerate(("shl.b32 a, {}, 2;", "shl.b32 a, {}, 1;",
                               "mov.b32 a, {};", "shr.u32 a, {}, 1;")):  # fmt: skip
        code = f"code{4 * own + j}"
        # a & 0x44444444 | code
        text += f"""
    {shift.format(f"flip{own}")}
    lop3.b32 {code}, a, 0x44444444, {code}, 0xEA;"""
        for half in range(2):
            text += f"\n    prmt.b32 w, positive, negative, {code};"
            for limb in range(s.limbs):
                word = 8 * limb + 2 * j + half
                x = f"x{word * s.steps + step}"
                text += f"\n    dp4a.s32.s32 m{limb}, w, {x}, m{limb};"
            if half == 0:
                text += f"\n    shr.u32 {code}, {code}, 16;"
    text += f"""
    shr.u32 times, signs{row % 2 * s.steps + step}, 27;
    or.b32 times, times, 1;
    mad.lo.s32 m0, m0, 256, m1;
    mul.lo.s32 m0, m0, times;
    cvt.rn.f32.s32 f, m0;"""
    if s.limbs == 3:
        text += f"""
    mul.lo.s32 m2, m2, times;
    cvt.rn.f32.s32 g, m2;
    fma.rn.f32 f, f, {number(256.0)}, g;"""
    if step == 0:
        text += f"\n    mul.rn.f32 sum{row}, f, scale0;"
    else:
        text += f"\n    fma.rn.f32 sum{row}, f, scale{step}, sum{row};"
    if step == s.steps - 1:
        text += f"""
    cvt.f32.f16 d, half{row % 2};
    mul.rn.f32 sum{row}, sum{row}, d;"""
    return text


def activate(s: Shape) -> str:
    """Leave the SwiGLU of a row of gate, in the lower lanes, and of up in `sum0`."""
    text = f"""
    shfl.sync.down.b32 g, sum0, {LANES // 2}, 31, 0xffffffff;
    min.f32 sum0, sum0, {number(s.limit)};
    min.f32 g, g, {number(s.limit)};
    max.f32 g, g, {number(-s.limit)};"""
    text += exponential("f", "sum0", -1)
    return (
        text
        + f"""
    add.rn.f32 f, f, {number(1.0)};
    div.rn.f32 sum0, sum0, f;
    mul.rn.f32 sum0, sum0, g;"""
    )


def finish(s: Shape) -> str:
    """Write the group of a task in fixed point, and count it."""
    levels = ORDER.levels
    text = f"""
    and.b32 a, number, 1;
    mad.lo.u32 a, a, {s.exchanged}, shared;
    mad.lo.u32 a, lane, 4, a;
    ld.shared.f32 f, [a+{s.values}];""" + tell(s.read, "number")
    text += fix(s.dtype)
    text += f"""
    and.b32 a, tile, {levels - 1};{divide("b", "tile", levels)}
    mad.lo.u32 to, a, {s.tiles // levels}, b;
    mul.lo.u32 a, pair, {s.limbs * s.tiles};
    add.u32 a, a, to;
    mul.lo.u32 a, a, {GROUP};
    add.u32 a, a, lane;
    mov.b64 base, %hidden_words;
    mad.wide.u32 address, a, 1, base;"""
    text += store_words(s.limbs, "address", s.tiles * GROUP)
    text += f"""
    mad.lo.u32 to, pair, {s.tiles}, to;
    mov.b64 base, %hidden_scale;
    mad.wide.u32 address, to, 4, base;
    @first st.global.f32 [address], unit;"""
    for bit in (1, 2, 4, 8):
        text += add_lanes("f", "g", bit)
    text += f"""
    and.b32 a, lane, {LANES // 2 - 1};
    setp.eq.u32 p, a, 0;{divide("a", "lane", LANES // 2)}
    mad.lo.u32 a, to, 2, a;
    mov.b64 base, %hidden_sums;
    mad.wide.u32 address, a, 4, base;
    @p st.global.f32 [address], f;
    div.u32 a, pair, {s.at_once};
    mov.b64 base, %counters;
    mad.wide.u32 address, a, 4, base;"""
    return text + s.finished.count(f"[address+{s.at_finished}]")
