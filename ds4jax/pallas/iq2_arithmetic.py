"""What `moe_ptx`'s programs compute of gate and up, in PTX: products, their SwiGLU.

Nothing is converted: codes and signs are nibbles by which `prmt` picks four weights.
Matrix units multiply them; a lane has groups of two rows of each tile.
"""

from __future__ import annotations

from ds4jax.pallas import matrix_units
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.matrix_units import LINES, PARTS
from ds4jax.pallas.moe_shape import BLOCK, HALF, ORDER, ROWS, WARPS, Shape
from ds4jax.pallas.moe_slots import tell
from ds4jax.pallas.ptx import (
    LANES,
    add_lanes,
    add_product,
    add_shared,
    divide,
    exponential,
    number,
    registers,
)
from ds4jax.pallas.ptx_fixed_point import fix, store_words

TILES = ROWS // 2
"""Of matrix units in a task: a lane has two rows of each."""

_SIGNS = "shl.b32 a, {}, 2;", "shl.b32 a, {}, 1;", "mov.b32 a, {};", "shr.u32 a, {}, 1;"
"""What brings bit j of nibbles, the signs of row j of the grid, to bit 2."""


def _own(turn: int, row: int) -> int:
    """Return which registers a row has: those of two turns are in use at a time."""
    return turn % 2 * 2 + row


def find_groups(s: Shape) -> str:
    """Find where the first half of a task has a lane's groups of its first row.

    A tile's rows are of gate and of up in turn: those of one weight would be in each
    other's way, for a row's parts take half of the banks of shared memory.
    """
    *_, (_, d) = s.gated_planes
    return f"""
    and.b32 a, own_line, 1;
    mad.lo.u32 at, a, {s.gated // 2}, here;
    shr.u32 a, own_line, 1;
    mad.lo.u32 at_d, a, {d // HALF}, at;
    mad.lo.u32 at, a, {4 * s.groups}, at;
    mad.lo.u32 b, warp, {PARTS}, own_part;
    mul.lo.u32 b, b, {s.steps};
    mad.lo.u32 at, b, 4, at;{divide("b", "b", BLOCK)}
    mad.lo.u32 at_d, b, 2, at_d;"""


def read(s: Shape, tile: int) -> str:
    """Read a lane's groups of both of its rows of a tile."""
    (_, grid), (_, signs), (_, d) = s.gated_planes
    half, of_half = divmod(tile, TILES // 2)
    text = ""
    for row in range(2):
        own, line = _own(tile, row), (2 * of_half + row) * LINES // 2
        words, flips = (
            registers(name, own * s.steps, s.steps) for name in ("grid", "signs")
        )
        at = half * s.gated + line * s.groups * 4
        at_d = half * s.gated + grid + signs + line * (d // HALF)
        text += f"""
    ld.shared.v{s.steps}.b32 {words}, [at+{at}];
    ld.shared.v{s.steps}.b32 {flips}, [at+{at + grid}];
    ld.shared.b16 half{own}, [at_d+{at_d}];"""
    return text


def look_up(s: Shape, turn: int, tile: int, step: int) -> str:
    """Look the codes of a group's weights up, of both rows, and order their signs.

    Bit j of nibble i of `flip` is then the sign of weight i of row j of the grid.
    """
    text = ""
    for row in range(2):
        group, to = _own(tile, row) * s.steps + step, _own(turn, row)
        text += f"""
    and.b32 a, signs{group}, 0x0FFFFFFF;
    shl.b32 b, signs{group}, 4;
    xor.b32 flip{to}, a, b;"""
        for j in range(4):
            text += f"""
    prmt.b32 a, grid{group}, 0, 0x444{j};
    mad.lo.u32 a, a, {4 * LANES}, lane_table;
    ld.shared.b32 code{4 * to + j}, [a];"""
    return text


def multiply(s: Shape, turn: int, tile: int, step: int) -> str:
    """Add the products of a group of both rows to their sums."""
    text = ""
    for j, signs in enumerate(_SIGNS):
        for row in range(2):
            own, word = _own(turn, row), 8 * row + 2 * j
            code = f"code{4 * own + j}"
            # a & 0x44444444 | code
            text += f"""
    {signs.format(f"flip{own}")}
    lop3.b32 {code}, a, 0x44444444, {code}, 0xEA;
    prmt.b32 w{word}, positive, negative, {code};
    shr.u32 {code}, {code}, 16;
    prmt.b32 w{word + 1}, positive, negative, {code};"""
    x = [8 * (i * s.steps + step) for i, _ in enumerate(matrix_units.held(s.limbs))]
    text += matrix_units.multiply("s8", 8, (0, 8), x)
    for row in range(2):
        own, to = _own(tile, row), f"sum{2 * tile + row}"
        text += f"""
    shr.u32 times, signs{own * s.steps + step}, 27;
    or.b32 times, times, 1;"""
        text += matrix_units.to_float(s.limbs, row)
        text += add_product(to, "f", f"scale{step}", step == 0)
        if step == s.steps - 1:
            text += f"""
    cvt.f32.f16 d, half{own};
    mul.rn.f32 {to}, {to}, d;"""
    return text


def activate(s: Shape) -> str:
    """Leave in `sum0` the SwiGLU of what is there, of gate, and of `g`, of up."""
    text = f"""
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
    text = "\n    mad.lo.u32 a, lane, 4, shared;"
    text += add_shared("sum0", "f", "a", s.values, WARPS, 8 * GROUP)
    text += add_shared("g", "f", "a", s.values + 4 * GROUP, WARPS, 8 * GROUP)
    text += tell(s.read, "number")
    # Weights were multiplied by eight times their scale, a whole number.
    text += f"""
    mul.rn.f32 sum0, sum0, {number(1 / 8)};
    mul.rn.f32 g, g, {number(1 / 8)};"""
    text += activate(s) + "\n    mov.f32 f, sum0;" + fix(s.dtype)
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
