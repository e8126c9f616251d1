"""Attention at the beginning of `attn_out`'s programs, in PTX.

Sources are cut into parts of PART rows.  A task is a part, HEADS query heads and a row
of queries: programs take every so many.  Of a task queries are rotated, and scaled by
their norm where logits are; its softmax and sums go to memory.  Programs that have done
theirs wait for each other, and then put the parts together (`attend_together`).

Registers that a program has for this: predicates p and first; lane, warp, shared, task,
row, a, b, at, other; address, base, far; f, g; those of `ptx_fixed_point`.
"""

from __future__ import annotations

import numpy as np

from ds4jax.pallas.attend_shape import (
    CHUNK,
    HEADS,
    PART,
    SCORES,
    WARPS,
    Place,
    Shape,
)
from ds4jax.pallas.attend_together import put_together
from ds4jax.pallas.ptx import LANES, add_lanes, divide, number, registers

_KEYS = PART // WARPS
"""Rows of a part that a warp brings."""

_QUERIES = HEADS // WARPS
"""Heads of a task that a warp brings."""

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

LOG2_E = number(np.log2(np.e))


def declare(s: Shape) -> str:
    """Declare the registers that are used here alone."""
    each = s.width // LANES
    return f"""
    .reg .pred att_turns, att_sees;
    .reg .b16 att_low, att_high;
    .reg .b32 att_part, att_heads, att_to, att_turn, att_own<{_KEYS}>, att_seen<{_KEYS}>;
    .reg .b32 att_a<{4 * PART // _STEP}>, att_b<2>, att_w<2>;
    .reg .f32 att_q<{_QUERIES * each}>, att_x<{_KEYS * each}>, att_cos<4>, att_sin<4>, att_c<8>, att_weight<{2 * PART // 4}>;
    .reg .f32 att_peak<2>, att_total<2>, att_scale, att_part_sum<{s.parts}>, att_sink;"""


def attend(s: Shape, place: Place) -> str:
    """Return the text, which ends when all results are there in fixed point."""
    text = f"""
    mov.u32 task, %ctaid.x;
ATTEND:
    setp.ge.u32 p, task, {s.tasks};
    @p bra ATTENDED;{divide("a", "task", s.parts)}
    mul.lo.u32 b, a, {s.parts};
    sub.u32 att_part, task, b;{divide("row", "a", s.blocks)}
    mul.lo.u32 b, row, {s.blocks};
    sub.u32 att_heads, a, b;
    mul.lo.u32 att_heads, att_heads, {HEADS};"""
    text += _load_queries(s) + _find_rows(s) + _load_rows(s)
    text += _keep_queries(s, place) + _keep_rows(s, place)
    text += f"""
    setp.ge.u32 p, task, {s.programs};
    @p bra BROUGHT;
    bar.arrive {place.barrier + 1}, {(WARPS + 1) * LANES};
BROUGHT:"""
    text += meet(place) + _score(s, place) + meet(place)
    text += _weigh(s, place) + _add(s, place) + meet(place)
    text += f"""
    add.u32 task, task, {s.programs};
    bra ATTEND;
ATTENDED:
    setp.ne.u32 p, warp, {WARPS - 1};
    @p bra ATTENDED_ALL;
    mov.b64 base, %counters;"""
    own = f"[base+{place.counters}]"
    if s.attending < s.programs:
        text += f"""
    mov.u32 a, %ctaid.x;
    setp.ge.u32 p, a, {s.attending};
    @p bra ATTENDED_NONE;"""
    text += s.attended.count(own) + "\nATTENDED_NONE:"
    text += s.attended.wait("ATTENDED_WAIT", own)
    return text + "\nATTENDED_ALL:" + meet(place) + put_together(s, place)


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


def meet(place: Place) -> str:
    """Have the warps that take part meet."""
    return f"\n    bar.sync {place.barrier}, {WARPS * LANES};"


def _find_rows(s: Shape) -> str:
    """Find a warp's rows of the task's part, `att_own`, all ones where none is seen.

    And the address of the source, `far`, and its last row, `other`.
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
        for i in range(_KEYS):
            text += f"\n    setp.ne.u32 p, att_seen{i}, 0;"
            if source.size % PART:
                text += f"""
    add.u32 a, at, {i};
    setp.lt.and.u32 p, a, {source.size}, p;"""
            text += f"\n    selp.b32 att_own{i}, att_own{i}, 0xffffffff, p;"
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
    mad.lo.u32 a, warp, {_QUERIES}, a;
    mul.lo.u32 a, a, {s.width};
    mad.lo.u32 a, lane, 4, a;
    mov.b64 base, %query;
    mad.wide.u32 address, a, 4, base;"""
    for i in range(_QUERIES):
        for chunk in range(chunks):
            own = registers("att_q", 4 * (i * chunks + chunk), 4)
            at = 4 * (i * s.width + chunk * CHUNK)
            text += f"\n    ld.global.nc.v4.f32 {own}, [address+{at}];"
    return text


def _keep_queries(s: Shape, place: Place) -> str:
    """Rotate a warp's queries, and find what their norm makes a factor of scores."""
    chunks = s.width // CHUNK
    text = f"""
    mad.lo.u32 at, warp, {_QUERIES * s.line}, shared;
    mad.lo.u32 at, lane, 8, at;
    mad.lo.u32 b, warp, {4 * _QUERIES}, shared;"""
    for i in range(_QUERIES):
        own = [f"att_q{4 * i * chunks + j}" for j in range(4 * chunks)]
        text += f"\n    mul.f32 f, {own[0]}, {own[0]};"
        for x in own[1:]:
            text += f"\n    fma.rn.f32 f, {x}, {x}, f;"
        for bit in (16, 8, 4, 2, 1):
            text += add_lanes("f", "g", bit)
        text += f"""
    mul.f32 f, f, {number(1 / s.width)};
    add.f32 f, f, {number(s.eps)};
    sqrt.rn.f32 f, f;
    div.rn.f32 f, {number(s.width**-0.5)}, f;
    @first st.shared.f32 [b+{place.shared + s.scales + 4 * i}], f;"""
        for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
            x, pair = own[-4 + one], own[-4 + other]
            text += f"""
    mul.f32 att_c{one}, {x}, att_cos{one};
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
    setp.ne.u32 att_sees, att_own{i}, 0xffffffff;
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


def _multiply(sums: int, a: int) -> str:
    """Add a product of tiles to four registers of sums."""
    own = registers("att_c", sums, 4)
    of = registers("att_a", a, 4), registers("att_b", 0, 2)
    kind = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    return f"\n    {kind} {own}, {of[0]}, {of[1]}, {own};"


def _score(s: Shape, place: Place) -> str:
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
    mad.lo.u32 other, other, {_TILE * s.line}, at;"""
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
        text += f"\n    add.f32 att_c{i}, att_c{i}, att_c{4 + i};"
    text += meet(place)
    for i in range(2):
        to = place.shared + s.scores + 8 * i * 4 * SCORES
        text += f"\n    st.shared.v2.f32 [att_to+{to}], {registers('att_c', 2 * i, 2)};"
    return text


def _weigh(s: Shape, place: Place) -> str:
    """Find the weights of the part's rows, as the first operand of their sum.

    All warps do, and the first writes the heads' peaks and totals.
    """
    text = f"""
    shr.u32 a, lane, 2;
    and.b32 b, lane, 3;
    mad.lo.u32 at, a, {4 * SCORES}, shared;
    mad.lo.u32 at, b, 8, at;
    mad.lo.u32 att_to, b, 8, shared;
    mad.lo.u32 other, a, 4, shared;"""
    each = 2 * _TILES
    for r in range(2):
        own = [f"att_weight{r * each + i}" for i in range(each)]
        text += f"\n    ld.shared.f32 att_scale, [other+{place.shared + s.scales + 32 * r}];"
        for tile in range(_TILES):
            at = place.shared + s.scores + 8 * r * 4 * SCORES + 4 * _TILE * tile
            found = "{" + ", ".join(own[2 * tile : 2 * tile + 2]) + "}"
            mask = place.shared + s.masks + 4 * _TILE * tile
            text += f"""
    ld.shared.v2.f32 {found}, [at+{at}];
    ld.shared.v2.f32 {{f, g}}, [at+{at + s.half}];
    ld.shared.v2.f32 {{att_c0, att_c1}}, [att_to+{mask}];"""
            for x, half, add in zip(own[2 * tile :], "fg", ("att_c0", "att_c1")):
                text += f"""
    add.f32 {x}, {x}, {half};
    fma.rn.f32 {x}, {x}, att_scale, {add};"""
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
    add.f32 {x}, {x}, g;
    mul.f32 {x}, {x}, {LOG2_E};
    ex2.approx.f32 {x}, {x};"""
        text += f"\n    add.f32 {total}, {own[0]}, {own[1]};"
        for x in own[2:]:
            text += f"\n    add.f32 {total}, {total}, {x};"
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


def _add(s: Shape, place: Place) -> str:
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
    return text + f"""
    add.u32 at, at, {2 * _TILE * _ADDED};
    add.u32 att_turn, att_turn, {_TILE * _ADDED};
    setp.lt.u32 p, att_turn, {channels};
    @p bra ADD;"""
