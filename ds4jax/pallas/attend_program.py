"""Attention at the beginning of `attn_out`'s programs, in PTX.

Sources are cut into parts of PART rows.  A task is a part, one block of query heads or
two, and a row of queries: programs take every so many.  Rows and rotated queries come
to shared memory in bfloat16, what all warps make of them goes to memory, and programs
that have done their tasks wait for each other and put parts together.

Registers that a program has for this: predicates p and first; lane, warp, shared, task,
row, a, b, at, other; address, base, far; f, g; those of `ptx_fixed_point`.  Of named
barriers it has the one of its place and the next.
"""

from __future__ import annotations

import numpy as np

from ds4jax.pallas import attend_arithmetic
from ds4jax.pallas.attend_arithmetic import add, score, weigh
from ds4jax.pallas.attend_shape import CHUNK, HEADS, PART, WARPS, Shape
from ds4jax.pallas.attend_together import await_programs, put_together
from ds4jax.pallas.ptx import BITS, LANES, Place, add_lanes, divide, number, registers

_KEYS = PART // WARPS
"""Rows of a part that a warp brings."""

_QUERIES = HEADS // WARPS
"""Heads of each block that a warp brings."""


def declare(s: Shape) -> str:
    """Declare the registers that are used here alone."""
    each = s.width // LANES
    return (
        attend_arithmetic.declare()
        + f"""
    .reg .pred att_turns, att_sees;
    .reg .b32 att_part, att_heads, att_block, att_left, att_w<2>;
    .reg .b32 att_own<{_KEYS}>, att_seen<{_KEYS}>;
    .reg .f32 att_q<{_QUERIES * s.each * each}>, att_x<{_KEYS * each}>;
    .reg .f32 att_cos<4>, att_sin<4>, att_c<8>, att_sum<{s.parts}>, att_sink;"""
    )


def attend(s: Shape, place: Place) -> str:
    """Return the text, which ends when all results are there in fixed point."""
    text = f"""
    mov.u32 task, %ctaid.x;
ATTEND:
    setp.ge.u32 p, task, {s.tasks};
    @p bra ATTENDED;{divide("a", "task", s.parts)}
    mul.lo.u32 b, a, {s.parts};
    sub.u32 att_part, task, b;{divide("row", "a", s.blocks // s.each)}
    mul.lo.u32 b, row, {s.blocks // s.each};
    sub.u32 att_heads, a, b;
    mul.lo.u32 att_heads, att_heads, {HEADS * s.each};"""
    text += _load_queries(s) + _find_rows(s) + _load_rows(s)
    text += _keep_queries(s, place) + _keep_rows(s, place)
    text += f"""
    setp.ge.u32 p, task, {s.programs};
    @p bra BROUGHT;
    bar.arrive {place.barrier + 1}, {(WARPS + 1) * LANES};
BROUGHT:"""
    text += place.meet(WARPS) + "\n    mov.u32 att_block, 0;\nBLOCK:"
    text += score(s, place) + place.meet(WARPS) + weigh(s, place) + add(s, place)
    if s.each > 1:
        text += f"""
    add.u32 att_heads, att_heads, {HEADS};
    add.u32 att_block, att_block, 1;
    setp.lt.u32 p, att_block, {s.each};
    @p bra BLOCK;"""
    text += place.meet(WARPS)
    text += f"""
    add.u32 task, task, {s.programs};
    bra ATTEND;
ATTENDED:"""
    text += await_programs(s.attended, s.attending, place, 0, "ATTENDED")
    return text + put_together(s, place)


def await_loads(s: Shape, place: Place) -> str:
    """Have another warp wait until what a program's first task needs has come.

    What that has copied before, memory would bring before it.
    """
    return f"""
    mov.u32 a, %ctaid.x;
    setp.ge.u32 p, a, {s.attending};
    @p bra LOADED;
    bar.sync {place.barrier + 1}, {(WARPS + 1) * LANES};
LOADED:"""


def _find_rows(s: Shape) -> str:
    """Find a warp's rows of the task's part, `att_own`, and whether they are seen.

    And the source's address, `far`, its last row, `other`, and how many rows are left.
    """
    text = ""
    for n, source in enumerate(s.sources):
        start, end = s.ends[n : n + 2]
        if n:
            text += f"\nSOURCE{n}:"
        if n < len(s.sources) - 1:
            text += f"""
    setp.ge.u32 p, att_part, {end};
    @p bra SOURCE{n + 1};"""
        text += f"""
    mov.b64 far, %rows{n};
    mov.u32 other, {source.rows - 1};
    sub.u32 at, att_part, {start};
    mul.lo.u32 at, at, {PART};
    mad.lo.u32 at, warp, {_KEYS}, at;"""
        for i in range(_KEYS):
            # Behind the last there is nothing to see.
            text += f"""
    add.u32 a, at, {i};
    min.u32 a, a, {source.size - 1};
    mad.lo.u32 b, row, {source.size}, a;
    mov.b64 base, %visible{n};
    mad.wide.u32 address, b, 4, base;
    ld.global.nc.b32 att_seen{i}, [address];
    mov.u32 att_own{i}, a;"""
            if source.chosen:
                text += f"""
    mov.b64 base, %index{n};
    mad.wide.u32 address, b, 4, base;
    ld.global.nc.b32 att_own{i}, [address];"""
        text += f"""
    max.u32 att_left, at, {source.size};
    sub.u32 att_left, att_left, at;"""
        text += "\n    bra SOURCES;" if n < len(s.sources) - 1 else ""
    return text + "\nSOURCES:"


def _load_queries(s: Shape) -> str:
    """Load a warp's queries, and the rotation of a lane's last channels."""
    chunks = s.width // CHUNK
    first = LANES - s.turned // 4
    text = f"""
    setp.ge.u32 att_turns, lane, {first};
    mul.lo.u32 a, row, {s.turned};
    mad.lo.u32 a, lane, 4, a;
    sub.u32 a, a, {4 * first};"""
    for name, value in (("cos", 1.0), ("sin", 0.0)):
        for i in range(4):
            text += f"\n    mov.f32 att_{name}{i}, {number(value)};"
        text += f"""
    mov.b64 base, %{name};
    mad.wide.u32 address, a, 4, base;
    @att_turns ld.global.nc.v4.f32 {registers(f"att_{name}", 0, 4)}, [address];"""
    text += f"""
    mad.lo.u32 a, row, {s.heads}, att_heads;
    mad.lo.u32 a, warp, {_QUERIES * s.each}, a;
    mul.lo.u32 a, a, {s.width};
    mad.lo.u32 a, lane, 4, a;
    mov.b64 base, %query;
    mad.wide.u32 address, a, 4, base;"""
    for i in range(_QUERIES * s.each):
        for chunk in range(chunks):
            own = registers("att_q", 4 * (i * chunks + chunk), 4)
            at = 4 * (i * s.width + chunk * CHUNK)
            text += f"\n    ld.global.nc.v4.f32 {own}, [address+{at}];"
    return text


def _keep_queries(s: Shape, place: Place) -> str:
    """Rotate a warp's queries, and find what their norm makes a factor of scores."""
    chunks = s.width // CHUNK
    text = f"""
    mad.lo.u32 at, warp, {_QUERIES * s.each * s.line}, shared;
    mad.lo.u32 at, lane, 8, at;
    mad.lo.u32 b, warp, {4 * _QUERIES * s.each}, shared;"""
    for i in range(_QUERIES * s.each):
        own = [f"att_q{4 * i * chunks + j}" for j in range(4 * chunks)]
        text += f"\n    mul.rn.f32 f, {own[0]}, {own[0]};"
        for x in own[1:]:
            text += f"\n    fma.rn.f32 f, {x}, {x}, f;"
        for bit in BITS:
            text += add_lanes("f", "g", bit)
        text += f"""
    mul.rn.f32 f, f, {number(1 / s.width)};
    add.rn.f32 f, f, {number(s.eps)};
    sqrt.rn.f32 f, f;
    div.rn.f32 f, {number(s.width**-0.5)}, f;
    @first st.shared.f32 [b+{place.shared + s.scales + 4 * i}], f;"""
        for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
            x, pair = own[-4 + one], own[-4 + other]
            text += f"""
    mul.rn.f32 att_c{one}, {x}, att_cos{one};
    fma.rn.f32 att_c{one}, {pair}, att_sin{one}, att_c{one};"""
        for one in range(4):
            text += f"\n    mov.f32 {own[-4 + one]}, att_c{one};"
        for chunk in range(chunks):
            text += _pack(own[4 * chunk : 4 * chunk + 4])
            to = place.shared + s.queries + i * s.line + 2 * chunk * CHUNK
            text += f"\n    st.shared.v2.b32 [at+{to}], {registers('att_w', 0, 2)};"
    return text


def _pack(values: list[str]) -> str:
    """Round four values to bfloat16, two to a word."""
    return "".join(
        f"\n    cvt.rn.bf16x2.f32 att_w{i}, {values[2 * i + 1]}, {values[2 * i]};"
        for i in range(2)
    )


def _load_rows(s: Shape) -> str:
    """Load a warp's rows of the part."""
    chunks, text = s.width // CHUNK, ""
    for i in range(_KEYS):
        text += f"""
    min.u32 a, att_own{i}, other;
    mul.lo.u32 a, a, {s.width};
    mad.lo.u32 a, lane, 4, a;
    mad.wide.u32 address, a, 4, far;"""
        for chunk in range(chunks):
            own = registers("att_x", 4 * (i * chunks + chunk), 4)
            text += f"\n    ld.global.v4.f32 {own}, [address+{4 * chunk * CHUNK}];"
    return text


def _keep_rows(s: Shape, place: Place) -> str:
    """Keep them; of unseen ones, which may hold anything, zeros."""
    chunks = s.width // CHUNK
    text = f"""
    mad.lo.u32 at, warp, {_KEYS * s.line}, shared;
    mad.lo.u32 at, lane, 8, at;
    mad.lo.u32 b, warp, {4 * _KEYS}, shared;"""
    for i in range(_KEYS):
        text += f"""
    setp.ne.u32 att_sees, att_seen{i}, 0;
    setp.lt.and.u32 att_sees, {i}, att_left, att_sees;
    selp.f32 f, {number(0.0)}, {number(-np.inf)}, att_sees;
    @first st.shared.f32 [b+{place.shared + s.masks + 4 * i}], f;"""
        for chunk in range(chunks):
            x = 4 * (i * chunks + chunk)
            text += _pack([f"att_x{x + j}" for j in range(4)])
            for word in range(2):
                text += f"\n    selp.b32 att_w{word}, att_w{word}, 0, att_sees;"
            to = place.shared + i * s.line + 2 * chunk * CHUNK
            text += f"\n    st.shared.v2.b32 [at+{to}], {registers('att_w', 0, 2)};"
    return text
