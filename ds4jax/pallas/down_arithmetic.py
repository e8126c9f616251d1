"""What `moe_ptx`'s programs compute of down, in PTX: products in Q8_0 and Q2_K.

Of Q8_0 a lane has the same chunks of 16 bytes of each of a warp's rows, so that it
holds their activations in registers.  Of Q2_K, on matrix units, a warp has four chunks
of all rows of a block, and a lane one of every LINES-th.
"""

from __future__ import annotations

from ds4jax.pallas import matrix_units
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.matrix_units import LINES, PARTS
from ds4jax.pallas.moe_shape import DOWN_ROWS, HIDDEN, ORDER, Shape
from ds4jax.pallas.ptx import LANES, add_product, number, registers
from ds4jax.pallas.ptx_fixed_point import dot, to_float

_CHUNKS = HIDDEN // (16 * LANES)
"""That a lane has of a row in Q8_0: halves of groups."""

_GROUPS = HIDDEN // GROUP

_AT_ONCE = 2
"""Rows that a lane multiplies at a time."""

EXPONENT = 0x49000000
"""Bits of 2^19 as a float32, whose last bit is a sixteenth, in register `exponent`."""


def read_shexp(s: Shape) -> str:
    """Read a lane's hidden values of the shared expert.

    Not through the read-only cache: other programs have just written them.
    """
    text = f"""
    mul.lo.u32 a, own_row, {s.limbs * HIDDEN};
    mad.lo.u32 a, lane, 16, a;
    mov.b64 base, %shexp_words;
    mad.wide.u32 address, a, 1, base;"""
    for limb in range(s.limbs):
        for chunk in range(_CHUNKS):
            x = registers("x", 4 * (limb * _CHUNKS + chunk), 4)
            text += f"""
    ld.global.v4.b32 {x}, [address+{limb * HIDDEN + chunk * 16 * LANES}];"""
    text += f"""
    shr.u32 a, lane, 1;
    mad.lo.u32 a, own_row, {_GROUPS}, a;
    mov.b64 base, %shexp_scale;
    mad.wide.u32 address, a, 4, base;"""
    for chunk in range(_CHUNKS):
        text += f"""
    ld.global.f32 scale{chunk}, [address+{4 * chunk * LANES // 2}];"""
    return text


def multiply_shexp(s: Shape) -> str:
    """Multiply a warp's rows of a block by them."""
    (_, behind_d), _ = s.shexp_planes
    text = f"""
    mad.lo.u32 at, warp, {DOWN_ROWS * HIDDEN}, here;
    mad.lo.u32 at, lane, 16, at;
    mad.lo.u32 at_d, warp, {DOWN_ROWS * _GROUPS * 2}, here;
    shr.u32 a, lane, 1;
    mad.lo.u32 at_d, a, 2, at_d;
    mov.u32 turn, 0;
SHEXP_ROWS:"""
    words = [f"q{i}" for i in range(4)]
    for row in range(_AT_ONCE):
        for chunk in range(_CHUNKS):
            at = behind_d + row * HIDDEN + chunk * 16 * LANES
            at_d = 2 * row * _GROUPS + chunk * LANES
            text += f"""
    ld.shared.v4.b32 {registers("q", 0, 4)}, [at+{at}];
    ld.shared.b16 half0, [at_d+{at_d}];"""
            starts = [4 * (limb * _CHUNKS + chunk) for limb in range(s.limbs)]
            text += dot("s32", words, starts) + to_float(s.limbs)
            text += f"""
    cvt.f32.f16 d, half0;
    mul.rn.f32 d, d, scale{chunk};""" + add_product(f"value{row}", "f", "d", chunk == 0)
    steps = ("at", _AT_ONCE * HIDDEN), ("at_d", _AT_ONCE * 2 * _GROUPS)
    return text + _next_rows("SHEXP_ROWS", *steps)


def _next_rows(label: str, *steps: tuple[str, int]) -> str:
    """Go on to a lane's next rows; the values of these are the last of the sums.

    A loop, for what is multiplied once has to be fetched once, which takes longer.
    """
    text = ""
    for row in range(DOWN_ROWS - _AT_ONCE):
        text += f"\n    mov.f32 sum{row}, sum{row + _AT_ONCE};"
    for row in range(_AT_ONCE):
        text += f"\n    mov.f32 sum{DOWN_ROWS - _AT_ONCE + row}, value{row};"
    for register, step in steps:
        text += f"\n    add.u32 {register}, {register}, {step};"
    return (
        text
        + f"""
    add.u32 turn, turn, {_AT_ONCE};
    setp.lt.u32 p, turn, {DOWN_ROWS};
    @p bra {label};"""
    )


def read_shares(s: Shape) -> str:
    """Read the shares of a task's experts."""
    text = "\n    mad.lo.u32 a, pair, 4, shared;"
    for expert in range(s.at_once):
        text += f"\n    ld.shared.f32 share{expert}, [a+{s.shares + 4 * expert}];"
    return text


def add_experts(s: Shape) -> str:
    """Add the products of a lane's chunks with a task's experts, weighed."""
    (_, words), (_, scale), (_, sums) = s.hidden
    quants, scales, d, _ = (size // GROUP for _, size in s.down_planes)
    at_scales, at_d = GROUP * quants, GROUP * (quants + scales)
    text = f"""
    and.b32 a, stage, 1;
    mad.lo.u32 a, a, {s.stage}, shared;
    add.u32 a, a, {s.staged};
    mad.lo.u32 c, warp, {PARTS}, own_part;
    mad.lo.u32 at_words, c, 16, a;
    mad.lo.u32 at_words, own_limb, {HIDDEN}, at_words;
    mad.lo.u32 at_sums, c, 4, a;
    add.u32 at_sums, at_sums, {s.at_once * (words + scale)};
    shr.u32 b, c, 1;
    mad.lo.u32 at_scale, b, 4, a;
    add.u32 at_scale, at_scale, {s.at_once * words};
    mad.lo.u32 at, own_line, {quants}, here;
    mad.lo.u32 at, c, 16, at;
    mad.lo.u32 at_min, own_line, {scales}, here;
    mad.lo.u32 at_min, c, 4, at_min;
    mad.lo.u32 at_d, own_line, {d}, here;
    mad.lo.u32 at_d, warp, 2, at_d;
    add.u32 end, pair, {s.at_once};
EXPERT:"""
    text += _read_expert(s)

    def read_row(row: int, ahead: int) -> str:
        line = (row + ahead) * LINES
        return f"""
    ld.shared.v4.b32 {registers("q", 4 * row, 4)}, [at+{line * quants}];
    ld.shared.b32 packed{row}, [at_min+{at_scales + line * scales}];
    ld.shared.b16 half{2 * row}, [at_d+{at_d + line * d}];
    ld.shared.b16 half{2 * row + 1}, [at_d+{at_d + GROUP * d + line * d}];"""

    text += "".join(read_row(row, 0) for row in range(_AT_ONCE))
    text += """
    mov.u32 turn, 0;
ROWS:"""
    text += _multiply(s)
    for row in range(_AT_ONCE):
        text += f"\n    fma.rn.f32 value{row}, product{row}, share0, sum{row};"
        # Of the last rows there are none ahead: what lies there is read for nothing.
        text += read_row(row, _AT_ONCE)
    sizes = ("at", quants), ("at_min", scales), ("at_d", d)
    text += _next_rows("ROWS", *((to, _AT_ONCE * LINES * size) for to, size in sizes))
    for other in range(1, s.at_once):
        text += f"\n    mov.f32 share{other - 1}, share{other};"
    steps = (
        *((to, s.expert - GROUP * size) for to, size in sizes),
        ("at_words", words), ("at_scale", scale), ("at_sums", sums), ("pair", 1),
    )  # fmt: skip
    for register, step in steps:
        text += f"\n    add.u32 {register}, {register}, {step};"
    return (
        text
        + """
    setp.lt.u32 p, pair, end;
    @p bra EXPERT;"""
    )


def _read_expert(s: Shape) -> str:
    """Read the hidden values of an expert that a lane holds, and its scales.

    Bits of a level are multiplied where they are, which its scale makes up for.
    """
    (_, _), (_, scale), (_, sums) = s.hidden
    levels, text = ORDER.levels, ""
    for i, (holds, limb) in enumerate(matrix_units.held(s.limbs)):
        for level in range(levels):
            x = registers("x", 4 * (i * levels + level), 4)
            place = limb * HIDDEN + level * HIDDEN // levels
            text += f"\n    @{holds} ld.shared.v4.b32 {x}, [at_words+{place}];"
    for level in range(levels):
        text += f"""
    ld.shared.f32 scale{level}, [at_scale+{level * scale // levels}];
    ld.shared.f32 half_sum{level}, [at_sums+{level * sums // levels}];"""
        if level:
            power = number(4.0**-level)
            text += f"\n    mul.rn.f32 scale{level}, scale{level}, {power};"
    return text


def _multiply(s: Shape) -> str:
    """Multiply a chunk of two rows: four levels of 16 weights each, to `product`s.

    Minima are not converted: as the last bits of a float32 they are its value already.
    """
    levels, text = ORDER.levels, ""
    for level in range(levels):
        mask = 0x03030303 << 2 * level
        for i in range(4 * _AT_ONCE):
            text += f"\n    and.b32 w{i}, q{i}, {mask};"
        words = [4 * row for row in range(_AT_ONCE)]
        x = [4 * (i * levels + level) for i, _ in enumerate(matrix_units.held(s.limbs))]
        text += matrix_units.multiply("u8", 4, words, x)
        for row in range(_AT_ONCE):
            text += f"""
    and.b32 times, packed{row}, 0x0F0F0F0F;
    prmt.b32 times, times, 0, 0x444{level};"""
            text += matrix_units.to_float(s.limbs, row)
            text += add_product(f"product{row}", "f", f"scale{level}", level == 0)
            text += f"""
    and.b32 least, packed{row}, 0xF0F0F0F0;
    prmt.b32 least, least, exponent, 0x754{level};
    mov.b32 g, least;
    add.rn.f32 g, g, {number(-(2.0**19))};"""
            text += add_product(f"minimum{row}", "g", f"half_sum{level}", level == 0)
    for row in range(_AT_ONCE):
        text += f"""
    cvt.f32.f16 d, half{2 * row};
    mul.rn.f32 product{row}, product{row}, d;
    cvt.f32.f16 d, half{2 * row + 1};
    neg.f32 d, d;
    fma.rn.f32 product{row}, minimum{row}, d, product{row};"""
    return text
