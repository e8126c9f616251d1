"""How a launch begins that reads a hyper connection's streams, in PTX.

The first WARPS warps of a program take groups of channels, every so many, of all rows.
They merge a group's streams, and sum its part of the maps and of the products of each
two streams.  All programs then add all groups' sums up, each for itself, and so can
write the block's input for their groups: its mean of squares, which the norm needs, is
a form of those products.  No group is waited for but by sums.

Of a row there is one warp in a program where values are few.  The last program writes
the rows' weights of the output and of the streams.

Registers that a program has for this: predicates p and first; thread, lane, warp,
shared, a, b, c, row, turn; address, base; f, g, sum<8>; those of `ptx_fixed_point`.
"""

from __future__ import annotations

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.hc_arithmetic import (
    CELLS,
    POST,
    find_pairs,
    merge,
    read_row,
    read_streams,
    sinkhorn,
    sum_row,
)
from ds4jax.pallas.hc_shape import (
    MAPS,
    MAPS_EACH,
    STREAMS,
    SUMS,
    SUMS_EACH,
    WARPS,
    Shape,
)
from ds4jax.pallas.ptx import (
    Place,
    divide,
    registers,
    store_copies,
    store_row,
)
from ds4jax.pallas.ptx_fixed_point import fix, store_words

_READER = WARPS - 1
"""The warp that counts and waits for its program: of few rows, one that has none."""


def declare(s: Shape) -> str:
    """Declare the registers that are used here alone."""
    raw = f"\n    .reg .b16 hc_raw<{MAPS_EACH * STREAMS}>;" if _is_half(s) else ""
    return (
        raw
        + f"""
    .reg .pred hc_own;
    .reg .b32 hc_group, hc_channel, hc_slot, hc_first<{SUMS_EACH - MAPS_EACH}>;
    .reg .b32 hc_second<{SUMS_EACH - MAPS_EACH}>, hc_map;
    .reg .b64 hc_far;
    .reg .f32 hc_fn<{MAPS_EACH * STREAMS}>, hc_stream<{STREAMS}>, hc_mix<{CELLS}>;
    .reg .f32 hc_post<{STREAMS}>, hc_part<{s.parts}>, hc_base, hc_scale;
    .reg .f32 hc_norm, hc_pre<{STREAMS}>, hc_gate, hc_inverse, hc_cell, hc_x;
    .reg .f32 hc_term<{2 * s.terms}>;"""
    )


def _is_half(s: Shape) -> bool:
    return s.fn == "float16"


def load(s: Shape, place: Place) -> str:
    """Have all on its way that is read of a program's first group, and of all."""
    # The matrix's cells come last among maps, and here first: lanes of a row of it, or
    # of a column, then differ in two bits.
    text = f"""
    mov.u32 hc_group, %ctaid.x;
    mad.lo.u32 hc_slot, lane, 4, shared;
    add.u32 hc_slot, hc_slot, {place.shared};
    add.u32 hc_map, lane, {2 * STREAMS};
    rem.u32 hc_map, hc_map, {MAPS};"""
    text += _load_group(s, "FIRST") + _load_norm(s)
    return (
        text
        + f"""
    mov.b64 base, %hc_base;
    mad.wide.u32 address, hc_map, 4, base;
    ld.global.nc.f32 hc_base, [address];{divide("a", "hc_map", STREAMS)}
    min.u32 a, a, 2;
    mov.b64 base, %hc_scale;
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.f32 hc_scale, [address];"""
    )


def _load_group(s: Shape, label: str) -> str:
    """Load a group: a warp's row of what is merged, and its maps' weights."""
    row = STREAMS * s.width
    text = f"""
    min.u32 hc_channel, hc_group, {s.groups - 1};
    mad.lo.u32 hc_channel, hc_channel, {GROUP}, lane;
    setp.ge.u32 p, warp, {s.rows};
    @p bra HC_LOADED_{label};
    mad.lo.u32 a, warp, {row}, hc_channel;
    mov.b64 base, %hc_streams;
    mad.wide.u32 address, a, 4, base;"""
    for k in range(STREAMS):
        text += f"\n    ld.global.nc.f32 hc_stream{k}, [address+{4 * k * s.width}];"
    text += f"""
    mov.b64 base, %hc_mix;
    mad.wide.u32 address, warp, {4 * CELLS}, base;"""
    for j in range(0, CELLS, 4):
        own = registers("hc_mix", j, 4)
        text += f"\n    ld.global.nc.v4.f32 {own}, [address+{4 * j}];"
    text += f"""
    mov.b64 base, %hc_post;
    mad.wide.u32 address, warp, {4 * STREAMS}, base;
    ld.global.nc.v4.f32 {registers("hc_post", 0, STREAMS)}, [address];
    mad.lo.u32 a, warp, {s.width}, hc_channel;"""
    for part in range(s.parts):
        text += f"""
    mov.b64 base, %hc_part{part};
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.f32 hc_part{part}, [address];"""
    size, to = (2, "b16 hc_raw") if _is_half(s) else (4, "f32 hc_fn")
    text += f"""
HC_LOADED_{label}:
    mad.lo.u32 a, warp, {MAPS_EACH * row}, hc_channel;
    mov.b64 base, %hc_fn;
    mad.wide.u32 address, a, {size}, base;"""
    for i in range(MAPS_EACH * STREAMS):
        text += f"\n    ld.global.nc.{to}{i}, [address+{i * s.width * size}];"
    return text


def _load_norm(s: Shape) -> str:
    """Load the norm's weight of a lane's channel of the group."""
    return f"""
    min.u32 a, hc_group, {s.groups - 1};
    mad.lo.u32 a, a, {GROUP}, lane;
    mov.b64 base, %hc_norm;
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.f32 hc_norm, [address];"""


def prologue(s: Shape, place: Place) -> str:
    """Write the input, after `load`: all of it is there when a warp goes on.

    It is read as other programs have written it: not through the read-only cache.
    """
    return (
        _sum_groups(s, place)
        + _await_sums(s, place)
        + _add_sums(s, place)
        + read_row(s, place)
        + _write_input(s, place)
        + _write_weights(s)
        + f"""
HC_ROWS:
    setp.ne.u32 p, warp, {_READER};
    @p bra HC_INPUT;
    mov.b64 base, %counters;"""
        + s.written.wait("HC_WRITTEN", f"[base+{place.counters + s.at_written}]")
        + "\nHC_INPUT:"
        + place.meet(WARPS)
    )


def _sum_groups(s: Shape, place: Place) -> str:
    """Merge streams of a program's groups, and write the sums of each."""
    text = find_pairs()
    if s.programs > s.groups or s.own > 1:
        text += f"""
HC_GROUP:
    setp.ge.u32 p, hc_group, {s.groups};
    @p bra HC_SUMMED;"""
    text += f"""
    setp.ge.u32 p, warp, {s.rows};
    @p bra HC_MERGED;
    mad.lo.u32 a, warp, {s.merged_row}, hc_slot;"""
    text += merge(s) + "\nHC_MERGED:" + place.meet(WARPS)
    if _is_half(s):
        for i in range(MAPS_EACH * STREAMS):
            text += f"\n    cvt.f32.f16 hc_fn{i}, hc_raw{i};"
    text += "\n    mov.u32 row, 0;\nHC_ROW:" + sum_row(s)
    text += f"""
    add.u32 row, row, 1;
    setp.lt.u32 p, row, {s.rows};
    @p bra HC_ROW;"""
    text += place.meet(WARPS)
    text += f"""
    setp.ne.u32 p, warp, {_READER};
    @p bra HC_COUNTED;
    mov.b64 base, %counters;"""
    text += s.summed.count(f"[base+{place.counters}]") + "\nHC_COUNTED:"
    # While other programs' sums are on their way.
    text += _write_streams(s)
    if s.own > 1:
        text += f"""
    add.u32 hc_slot, hc_slot, {s.merged};
    add.u32 hc_group, hc_group, {s.programs};
    setp.ge.u32 p, hc_group, {s.groups};
    @p bra HC_SUMMED;"""
        text += _load_group(s, "NEXT") + "\n    bra HC_GROUP;"
    return text + "\nHC_SUMMED:"


def _write_streams(s: Shape) -> str:
    """Write the merged streams of the group, a warp one stream of every other row."""
    return (
        f"""
    and.b32 b, warp, {STREAMS - 1};{divide("row", "warp", STREAMS)}
HC_STREAM:
    setp.ge.u32 p, row, {s.rows};
    @p bra HC_STREAMED;
    mad.lo.u32 a, row, {STREAMS}, b;
    mad.lo.u32 c, a, {4 * GROUP}, hc_slot;
    ld.shared.f32 f, [c];
    mad.lo.u32 a, a, {s.width}, hc_channel;
    mov.b64 base, %streams;
    mad.wide.u32 address, a, 4, base;
    setp.eq.u32 p, lane, lane;"""
        + store_row("f", "p", "row", s.rows, s.copied_rows, 4 * STREAMS * s.width)
        + f"""
    add.u32 row, row, {WARPS // STREAMS};
    bra HC_STREAM;
HC_STREAMED:"""
    )


def _await_sums(s: Shape, place: Place) -> str:
    """Wait for all groups' sums; who has no use for them waits for the input only."""
    text = ""
    if s.programs > s.groups + 1:
        text += f"""
    mov.u32 a, %ctaid.x;
    setp.lt.u32 p, a, {s.groups};
    setp.eq.or.u32 p, a, {s.programs - 1}, p;
    @!p bra HC_ROWS;"""
    text += f"""
    setp.ne.u32 p, warp, {_READER};
    @p bra HC_READ;
    mov.b64 base, %counters;"""
    text += s.summed.wait("HC_SUMS", f"[base+{place.counters}]")
    return text + "\nHC_READ:" + place.meet(WARPS)


def _add_sums(s: Shape, place: Place) -> str:
    """Add up a warp's part of the groups' sums of each row, a lane two of them."""
    text = f"""
    mov.u32 row, 0;
    min.u32 c, lane, {SUMS // 2 - 1};
HC_ADD:
    mul.lo.u32 a, warp, {s.terms * s.rows};
    add.u32 a, a, row;
    mul.lo.u32 a, a, {SUMS // 2};
    add.u32 a, a, c;
    mov.b64 base, %hc_sums;
    mad.wide.u32 address, a, 8, base;"""
    for i in range(s.terms):
        own = registers("hc_term", 2 * i, 2)
        text += f"\n    ld.global.v2.f32 {own}, [address+{4 * i * s.rows * SUMS}];"
    for i in range(1, s.terms):
        for which in range(2):
            other = f"hc_term{2 * i + which}"
            text += f"\n    add.rn.f32 hc_term{which}, hc_term{which}, {other};"
    return (
        text
        + f"""
    mad.lo.u32 a, row, {WARPS}, warp;
    mad.lo.u32 a, a, {4 * SUMS}, shared;
    mad.lo.u32 a, c, 8, a;
    st.shared.v2.f32 [a+{place.shared + s.sums}], {registers("hc_term", 0, 2)};
    add.u32 row, row, 1;
    setp.lt.u32 p, row, {s.rows};
    @p bra HC_ADD;"""
        + place.meet(WARPS)
    )


def _write_input(s: Shape, place: Place) -> str:
    """Write a row's input for a program's groups, also in fixed point, and count it."""
    text = f"""
    mov.u32 hc_group, %ctaid.x;
    mad.lo.u32 hc_slot, warp, {s.merged_row}, shared;
    mad.lo.u32 hc_slot, lane, 4, hc_slot;
    add.u32 hc_slot, hc_slot, {place.shared};
HC_WRITE:
    setp.ge.u32 p, hc_group, {s.groups};
    @p bra HC_LAST;"""
    text += read_streams("hc_slot")
    text += "\n    mul.rn.f32 hc_x, hc_pre0, hc_stream0;"
    for k in range(1, STREAMS):
        text += f"\n    fma.rn.f32 hc_x, hc_pre{k}, hc_stream{k}, hc_x;"
    text += f"""
    mul.rn.f32 hc_x, hc_x, hc_inverse;
    mul.rn.f32 hc_x, hc_x, hc_norm;
    mul.lo.u32 hc_channel, hc_group, {GROUP};
    add.u32 hc_channel, hc_channel, lane;
    mad.lo.u32 a, warp, {s.width}, hc_channel;
    mov.b64 base, %x;
    mad.wide.u32 hc_far, a, 4, base;
    st.global.f32 [hc_far], hc_x;
    mov.f32 f, hc_x;"""
    text += fix(s.dtype) + _store_fixed(s)
    text += "\n    mov.b64 base, %counters;"
    text += s.written.count(f"[base+{place.counters + s.at_written}]")
    text += "\n    setp.eq.u32 p, lane, lane;"
    text += store_copies(
        "hc_x", "p", "warp", s.rows, s.copied_rows, 4 * s.width, "hc_far"
    )
    if s.own > 1:
        text += f"""
    add.u32 hc_slot, hc_slot, {s.merged};
    add.u32 hc_group, hc_group, {s.programs};"""
        text += _load_norm(s) + "\n    bra HC_WRITE;"
    return text + "\nHC_LAST:"


def _store_fixed(s: Shape) -> str:
    """Write the words that `fix` left of the group, and its scale."""
    return (
        f"""
    mad.lo.u32 a, warp, {s.limbs * s.width}, hc_channel;
    mov.b64 base, %x_words;
    mad.wide.u32 address, a, 1, base;"""
        + store_words(s.limbs, "address", s.width)
        + f"""
    mad.lo.u32 a, warp, {s.groups}, hc_group;
    mov.b64 base, %x_scale;
    mad.wide.u32 address, a, 4, base;
    @first st.global.f32 [address], unit;"""
    )


def _write_weights(s: Shape) -> str:
    """Have the last program write a row's weights of the output and of the streams.

    It does so when it has written what other programs wait for.
    """
    text = f"""
    mov.u32 a, %ctaid.x;
    setp.ne.u32 p, a, {s.programs - 1};
    @p bra HC_ROWS;
    add.rn.f32 f, hc_gate, hc_gate;
    and.b32 a, lane, {STREAMS - 1};
    mad.lo.u32 a, warp, {STREAMS}, a;
    mov.b64 base, %post;
    mad.wide.u32 address, a, 4, base;{divide("b", "lane", STREAMS)}
    setp.eq.u32 p, b, {POST // STREAMS};"""
    text += store_row("f", "p", "warp", s.rows, s.copied_rows, 4 * STREAMS)
    text += sinkhorn(s)
    text += f"""
    and.b32 a, lane, {CELLS - 1};
    mad.lo.u32 a, warp, {CELLS}, a;
    mov.b64 base, %mix;
    mad.wide.u32 address, a, 4, base;
    setp.lt.u32 p, lane, {CELLS};"""
    return text + store_row("hc_cell", "p", "warp", s.rows, s.copied_rows, 4 * CELLS)
