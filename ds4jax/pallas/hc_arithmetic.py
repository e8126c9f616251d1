"""What `hc_program` computes, in PTX: sums, shares, the norm, and Sinkhorn."""

from __future__ import annotations

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.hc_shape import (
    MAPS_EACH,
    PAIRS,
    STREAMS,
    SUMS,
    SUMS_EACH,
    WARPS,
    Shape,
)
from ds4jax.pallas.ptx import (
    LANES,
    Place,
    add_lanes,
    add_shared,
    add_up,
    divide,
    exponential,
    number,
)

_ADDED_UP = 8
"""Sums that a warp adds up together: a power of two, of which SUMS_EACH are there."""

CELLS = STREAMS * STREAMS
"""Lanes that have a cell of a row's matrix: the first ones."""

_PRE, POST = CELLS, CELLS + STREAMS
"""Lanes after them: of the streams' weights in the input, and of the output's."""


def find_pairs() -> str:
    """Find a warp's pairs of streams: where they are, from the first stream on."""
    text = ""
    for i in range(SUMS_EACH - MAPS_EACH):
        # Where a warp has no further pair, the sum of another is never read.
        most = min(WARPS, len(PAIRS) - WARPS * i) - 1
        text += f"""
    min.u32 a, warp, {most};
    add.u32 a, a, {WARPS * i};
    shl.b32 a, a, 1;"""
        for which, register in enumerate(("hc_first", "hc_second")):
            text += f"""
    mov.u32 b, {_table([pair[which] for pair in PAIRS])};
    shr.u32 b, b, a;
    and.b32 b, b, {STREAMS - 1};
    mul.lo.u32 {register}{i}, b, {4 * GROUP};"""
    return text


def _table(values: list[int]) -> int:
    """Return numbers below STREAMS, two bits each, the first lowest."""
    return sum(value << 2 * i for i, value in enumerate(values))


def merge(s: Shape) -> str:
    """Leave a lane's merged streams in shared memory, from `a` on."""
    text = ""
    if s.parts == 2:
        text += "\n    add.rn.f32 hc_part0, hc_part0, hc_part1;"
    for k in range(STREAMS):
        text += f"\n    mul.rn.f32 f, hc_mix{k}, hc_stream0;"
        for j in range(1, STREAMS):
            mix = f"hc_mix{j * STREAMS + k}"
            text += f"\n    fma.rn.f32 f, {mix}, hc_stream{j}, f;"
        text += f"""
    fma.rn.f32 f, hc_post{k}, hc_part0, f;
    st.shared.f32 [a+{4 * GROUP * k}], f;"""
    return text


def sum_row(s: Shape) -> str:
    """Write a warp's sums of row `row` of the group."""
    text = f"\n    mad.lo.u32 c, row, {s.merged_row}, hc_slot;"
    text += read_streams("c")
    for i in range(MAPS_EACH):
        text += f"\n    mul.rn.f32 sum{i}, hc_fn{i * STREAMS}, hc_stream0;"
        for k in range(1, STREAMS):
            fn = f"hc_fn{i * STREAMS + k}"
            text += f"\n    fma.rn.f32 sum{i}, {fn}, hc_stream{k}, sum{i};"
    for i in range(SUMS_EACH - MAPS_EACH):
        text += f"""
    add.u32 a, c, hc_first{i};
    ld.shared.f32 f, [a];
    add.u32 a, c, hc_second{i};
    ld.shared.f32 g, [a];
    mul.rn.f32 sum{MAPS_EACH + i}, f, g;"""
    for i in range(SUMS_EACH, _ADDED_UP):
        text += f"\n    mov.f32 sum{i}, {number(0.0)};"
    each = LANES // _ADDED_UP
    return (
        text
        + add_up(_ADDED_UP)
        + f"""
    mad.lo.u32 a, hc_group, {s.rows}, row;
    mul.lo.u32 a, a, {SUMS};
    mad.lo.u32 a, warp, {SUMS_EACH}, a;{divide("b", "lane", each)}
    add.u32 a, a, b;
    mov.b64 base, %hc_sums;
    mad.wide.u32 address, a, 4, base;
    setp.lt.u32 p, b, {SUMS_EACH};
    and.b32 b, lane, {each - 1};
    setp.eq.and.u32 p, b, 0, p;
    @p st.global.f32 [address], sum0;"""
    )


def read_streams(at: str) -> str:
    """Read a lane's channel of all streams, the first of which is at `at`."""
    return "".join(
        f"\n    ld.shared.f32 hc_stream{k}, [{at}+{4 * GROUP * k}];"
        for k in range(STREAMS)
    )


def read_row(s: Shape, place: Place) -> str:
    """Find what a row's input is made of, in its warp: others go on.

    A lane's map is left in `hc_cell`, its sigmoid in `hc_gate`, the streams' weights in
    `hc_pre` and the inverse of the input's root mean square in `hc_inverse`.
    """
    text = f"""
    setp.ge.u32 p, warp, {s.rows};
    @p bra HC_ROWS;
    mad.lo.u32 c, warp, {WARPS * 4 * SUMS}, shared;
    div.u32 a, hc_map, {MAPS_EACH};
    rem.u32 b, hc_map, {MAPS_EACH};
    mad.lo.u32 a, a, {SUMS_EACH}, b;
    mad.lo.u32 a, a, 4, c;"""
    text += _add_warps(s, place, "hc_cell")
    # Both halves of the warp have all pairs, for sums over lanes of one half.
    text += f"""
    and.b32 b, lane, {LANES // 2 - 1};
    min.u32 turn, b, {len(PAIRS) - 1};
    and.b32 a, turn, {WARPS - 1};
    mul.lo.u32 a, a, {SUMS_EACH};{divide("row", "turn", WARPS)}
    add.u32 a, a, row;
    add.u32 a, a, {MAPS_EACH};
    mad.lo.u32 a, a, 4, c;"""
    text += _add_warps(s, place, "g")
    text += f"""
    setp.lt.u32 p, b, {len(PAIRS)};
    selp.f32 g, g, {number(0.0)}, p;
    setp.lt.u32 hc_own, b, {STREAMS};
    selp.f32 hc_inverse, g, {number(0.0)}, hc_own;"""
    text += _add_half("hc_inverse", "f")
    text += _root("hc_inverse", STREAMS * s.width, s.rms_eps)
    text += """
    mul.rn.f32 hc_cell, hc_cell, hc_inverse;
    fma.rn.f32 hc_cell, hc_cell, hc_scale, hc_base;"""
    text += exponential("hc_gate", "hc_cell", -1)
    text += f"""
    add.rn.f32 hc_gate, hc_gate, {number(1.0)};
    div.rn.f32 hc_gate, {number(1.0)}, hc_gate;
    add.rn.f32 f, hc_gate, {number(s.hc_eps)};"""
    for k in range(STREAMS):
        text += f"\n    shfl.sync.idx.b32 hc_pre{k}, f, {_PRE + k}, 31, 0xffffffff;"
    text += """
    shl.b32 a, turn, 1;"""
    for which in range(2):
        text += f"""
    mov.u32 b, {_table([pair[which] for pair in PAIRS])};
    shr.u32 b, b, a;
    and.b32 b, b, {STREAMS - 1};
    add.u32 b, b, {_PRE};
    shfl.sync.idx.b32 hc_stream{which}, f, b, 31, 0xffffffff;"""
    text += f"""
    mul.rn.f32 hc_inverse, hc_stream0, hc_stream1;
    mul.rn.f32 hc_inverse, hc_inverse, g;
    selp.f32 f, {number(1.0)}, {number(2.0)}, hc_own;
    mul.rn.f32 hc_inverse, hc_inverse, f;"""
    return text + _add_half("hc_inverse", "f") + _root("hc_inverse", s.width, s.rms_eps)


def _add_warps(s: Shape, place: Place, to: str) -> str:
    """Add up what warps left of a sum, those of the first at `a`; `f` is used."""
    return add_shared(to, "f", "a", place.shared + s.sums, WARPS, 4 * SUMS)


def _add_half(value: str, other: str) -> str:
    """Add up the values of half a warp's lanes, in all of them."""
    bits = (2**i for i in range((LANES // 2 - 1).bit_length()))
    return "".join(add_lanes(value, other, bit) for bit in bits)


def _root(value: str, count: int, eps: float) -> str:
    """Make a sum of squares the inverse of their root mean square."""
    return f"""
    mul.rn.f32 {value}, {value}, {number(1 / count)};
    add.rn.f32 {value}, {value}, {number(eps)};
    sqrt.rn.f32 {value}, {value};
    div.rn.f32 {value}, {number(1.0)}, {value};"""


def sinkhorn(s: Shape) -> str:
    """Do `model.hyper.sinkhorn` of the cells; other lanes compute what nobody reads."""
    rows, columns = (1, 2), (STREAMS, 2 * STREAMS)
    text = "\n    mov.f32 f, hc_cell;"
    for bit in rows:
        text += f"""
    shfl.sync.bfly.b32 g, f, {bit}, 31, 0xffffffff;
    max.f32 f, f, g;"""
    text += """
    neg.f32 f, f;
    add.rn.f32 f, hc_cell, f;"""
    text += exponential("hc_cell", "f") + _normalize(rows, 0.0)
    text += f"\n    add.rn.f32 hc_cell, hc_cell, {number(s.hc_eps)};"
    text += _normalize(columns, s.hc_eps)
    if s.iterations > 1:
        text += "\n    mov.u32 turn, 1;\nHC_SINKHORN:"
        text += _normalize(rows, s.hc_eps) + _normalize(columns, s.hc_eps)
        text += f"""
    add.u32 turn, turn, 1;
    setp.lt.u32 p, turn, {s.iterations};
    @p bra HC_SINKHORN;"""
    return text


def _normalize(bits: tuple[int, ...], eps: float) -> str:
    """Divide cells by the sum of their line, whose lanes differ in those bits."""
    text = "\n    mov.f32 f, hc_cell;"
    text += "".join(add_lanes("f", "g", bit) for bit in bits)
    if eps:
        text += f"\n    add.rn.f32 f, f, {number(eps)};"
    return text + "\n    div.rn.f32 hc_cell, hc_cell, f;"
