"""What attention in `attn_out`'s programs computes, in PTX: scores, weights and sums.

Matrix units multiply tiles in bfloat16.  Of a tile a lane has two values that are side
by side, and four lanes have a row's eight: lane / 4 is the row, lane % 4 the pair.
"""

from __future__ import annotations

from ds4jax.pallas.attend_shape import HEADS, PART, SCORES, WARPS, Shape
from ds4jax.pallas.ptx import (
    Place,
    add_lanes,
    divide,
    exponential,
    number,
    registers,
)

_STEP = 16
"""Terms of a sum that matrix units take at once, of 16 rows and 8 columns."""

_TILE = 8

_TILES = PART // _TILE

_STEPS = 4
"""That are multiplied before a loop goes on: what runs once has to be fetched once."""

_ADDED = 2
"""Tiles, likewise."""

_LEAST = -1e30
"""The peak of a part of which nothing is visible: finite."""


def declare() -> str:
    """Declare the registers that are used here alone."""
    return f"""
    .reg .b16 att_low, att_high;
    .reg .b32 att_a<{4 * PART // _STEP}>, att_b<2>, att_to, att_turn;
    .reg .f32 att_weight<{4 * _TILES}>, att_scale, att_peak<2>, att_total<2>;"""


def _multiply(sums: int, a: int) -> str:
    """Add a product of tiles to four registers of sums."""
    own = registers("att_c", sums, 4)
    of = registers("att_a", a, 4), registers("att_b", 0, 2)
    kind = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    return f"\n    {kind} {own}, {of[0]}, {of[1]}, {own};"


def score(s: Shape, place: Place) -> str:
    """Multiply queries by a tile of rows: a warp half of the channels."""
    text = f"""
    shr.u32 a, lane, 2;
    and.b32 b, lane, 3;
    mad.lo.u32 at, a, {s.line}, shared;
    mad.lo.u32 at, b, 4, at;{divide("att_to", "warp", _TILES)}
    mad.lo.u32 at, att_to, {s.width}, at;
    and.b32 other, warp, {_TILES - 1};
    mul.lo.u32 att_to, att_to, {s.half};
    mad.lo.u32 att_to, other, {4 * _TILE}, att_to;
    mad.lo.u32 att_to, a, {4 * SCORES}, att_to;
    mad.lo.u32 att_to, b, 8, att_to;
    add.u32 att_to, att_to, shared;
    mad.lo.u32 att_to, att_block, {s.block}, att_to;
    mad.lo.u32 other, other, {_TILE * s.line}, at;
    mad.lo.u32 at, att_block, {s.block}, at;"""
    for i in range(8):
        text += f"\n    mov.f32 att_c{i}, {number(0.0)};"
    text += "\n    mov.u32 att_turn, 0;\nSCORE:"
    for step in range(_STEPS):
        place_a = place.shared + s.queries + 2 * _STEP * step
        for i, more in enumerate((0, 8 * s.line, _STEP, 8 * s.line + _STEP)):
            text += f"\n    ld.shared.b32 att_a{i}, [at+{place_a + more}];"
        for i in range(2):
            place_b = place.shared + 2 * _STEP * step + _STEP * i
            text += f"\n    ld.shared.b32 att_b{i}, [other+{place_b}];"
        text += _multiply(4 * (step % 2), 0)
    text += f"""
    add.u32 at, at, {2 * _STEP * _STEPS};
    add.u32 other, other, {2 * _STEP * _STEPS};
    add.u32 att_turn, att_turn, {_STEP * _STEPS};
    setp.lt.u32 p, att_turn, {s.width // 2};
    @p bra SCORE;"""
    for i in range(4):
        text += f"\n    add.rn.f32 att_c{i}, att_c{i}, att_c{4 + i};"
    text += place.meet(WARPS)
    for i in range(2):
        to = place.shared + s.scores + 8 * i * 4 * SCORES
        text += f"\n    st.shared.v2.f32 [att_to+{to}], {registers('att_c', 2 * i, 2)};"
    return text


def weigh(s: Shape, place: Place) -> str:
    """Find the weights of the part's rows, as the first operand of their sum.

    All warps do, and the first writes the heads' peaks and totals.
    """
    text = f"""
    shr.u32 a, lane, 2;
    and.b32 b, lane, 3;
    mad.lo.u32 at, a, {4 * SCORES}, shared;
    mad.lo.u32 at, b, 8, at;
    mad.lo.u32 at, att_block, {s.block}, at;
    mad.lo.u32 att_to, b, 8, shared;
    mad.lo.u32 other, a, 4, shared;
    mad.lo.u32 other, att_block, {4 * HEADS}, other;"""
    each = 2 * _TILES
    for r in range(2):
        own = [f"att_weight{r * each + i}" for i in range(each)]
        at_scale = place.shared + s.scales + 32 * r
        text += f"\n    ld.shared.f32 att_scale, [other+{at_scale}];"
        for tile in range(_TILES):
            at = place.shared + s.scores + 8 * r * 4 * SCORES + 4 * _TILE * tile
            found = "{" + ", ".join(own[2 * tile : 2 * tile + 2]) + "}"
            mask = place.shared + s.masks + 4 * _TILE * tile
            text += f"""
    ld.shared.v2.f32 {found}, [at+{at}];
    ld.shared.v2.f32 {{f, g}}, [at+{at + s.half}];
    ld.shared.v2.f32 {{att_c0, att_c1}}, [att_to+{mask}];"""
            for i, half in enumerate("fg"):
                x = own[2 * tile + i]
                text += f"""
    add.rn.f32 {x}, {x}, {half};
    fma.rn.f32 {x}, {x}, att_scale, att_c{i};"""
        peak, total = f"att_peak{r}", f"att_total{r}"
        text += f"\n    max.f32 {peak}, {own[0]}, {own[1]};"
        for x in own[2:]:
            text += f"\n    max.f32 {peak}, {peak}, {x};"
        for bit in (1, 2):
            text += f"""
    shfl.sync.bfly.b32 f, {peak}, {bit}, 31, 0xffffffff;
    max.f32 {peak}, {peak}, f;"""
        text += f"\n    max.f32 {peak}, {peak}, {number(_LEAST)};"
        text += f"\n    neg.f32 g, {peak};"
        for x in own:
            text += f"""
    add.rn.f32 {x}, {x}, g;""" + exponential(x, x)
        text += f"\n    add.rn.f32 {total}, {own[0]}, {own[1]};"
        for x in own[2:]:
            text += f"\n    add.rn.f32 {total}, {total}, {x};"
        for bit in (1, 2):
            text += add_lanes(total, "f", bit)
        for tile in range(_TILES):
            a = 4 * (tile // 2) + 2 * (tile % 2) + r
            low, high = own[2 * tile : 2 * tile + 2]
            text += f"\n    cvt.rn.bf16x2.f32 att_a{a}, {high}, {low};"
    text += f"""
    mad.lo.u32 other, att_part, {s.rows}, row;
    mad.lo.u32 other, other, {s.heads}, att_heads;
    add.u32 other, other, a;
    setp.eq.u32 p, warp, 0;
    @!p bra WEIGHED_ALL;
    setp.eq.u32 p, b, 0;"""
    for name in ("peak", "total"):
        text += f"""
    mov.b64 base, %{name};
    mad.wide.u32 address, other, 4, base;
    @p st.global.f32 [address], att_{name}0;
    @p st.global.f32 [address+32], att_{name}1;"""
    return text + "\nWEIGHED_ALL:"


def add(s: Shape, place: Place) -> str:
    """Add up the part's rows by their weights: a warp some of the channels."""
    channels = s.width // WARPS
    text = f"""
    mul.lo.u32 other, other, {s.width};
    mad.lo.u32 other, warp, {channels}, other;
    mad.lo.u32 other, b, 2, other;
    mov.b64 base, %summed;
    mad.wide.u32 far, other, 4, base;
    mad.lo.u32 at, b, {2 * s.line}, shared;
    mad.lo.u32 at, a, 2, at;
    mad.lo.u32 at, warp, {2 * channels}, at;
    mov.u32 att_turn, 0;
ADD:
    mad.wide.u32 address, att_turn, 4, far;"""
    for tile in range(_ADDED):
        for i in range(4):
            text += f"\n    mov.f32 att_c{i}, {number(0.0)};"
        for step in range(PART // _STEP):
            for i in range(2):
                row = _STEP * step + 8 * i
                place_b = place.shared + row * s.line + 2 * _TILE * tile
                text += f"""
    ld.shared.b16 att_low, [at+{place_b}];
    ld.shared.b16 att_high, [at+{place_b + s.line}];
    mov.b32 att_b{i}, {{att_low, att_high}};"""
            text += _multiply(0, 4 * step)
        for i in range(2):
            own = registers("att_c", 2 * i, 2)
            to = 4 * (8 * i * s.width + _TILE * tile)
            text += f"\n    st.global.v2.f32 [address+{to}], {own};"
    return (
        text
        + f"""
    add.u32 at, at, {2 * _TILE * _ADDED};
    add.u32 att_turn, att_turn, {_TILE * _ADDED};
    setp.lt.u32 p, att_turn, {channels};
    @p bra ADD;"""
    )
