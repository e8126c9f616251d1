"""The router in `moe_ptx`'s programs, in PTX: logits, probabilities, a row's choice.

Programs compute a few logits each, and then all of them choose, each for itself: who
has weights copied has to know the experts.
"""

from __future__ import annotations

from jax.experimental import pallas as pl

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.moe_shape import CHOOSERS, LOGITS, WARPS, Shape
from ds4jax.pallas.ptx import (
    LANES,
    add_lanes,
    add_shared,
    add_up,
    arrive,
    divide,
    exponential,
    number,
    registers,
    store_row,
    wait,
)

_TERMS = 8
"""Terms of log1p's series, the first left out of which is a 1e-9th of its value."""


def declare(s: Shape) -> str:
    """Declare the registers that are used here alone."""
    columns, keys = _columns(s), _keys(s)
    return f"""
    .reg .b16 weight<{LOGITS * columns}>;
    .reg .b32 key<{keys}>, own<{keys}>, piece, chosen;
    .reg .f32 x_of<{columns}>, picked, power, ratio;"""


def _columns(s: Shape) -> int:
    """Return how many columns a lane has of the router's weight."""
    return s.groups * GROUP // (WARPS * LANES)


def _keys(s: Shape) -> int:
    """Return how many experts a lane has to choose from: every LANES-th."""
    return pl.cdiv(s.routing.experts, LANES)


def load_router(s: Shape) -> str:
    """Load a thread's columns of the weights of `piece`, or the last.

    A program does so before all else: whatever is copied is then behind them.
    """
    columns, width = _columns(s), s.groups * GROUP
    text = f"""
    min.u32 a, piece, {s.routing.experts // LOGITS - 1};
    mul.lo.u32 a, a, {LOGITS * width};
    mad.lo.u32 a, thread, {columns}, a;
    mov.b64 base, %router;
    mad.wide.u32 address, a, 2, base;"""
    for expert in range(LOGITS):
        for column in range(0, columns, 4):
            own = registers("weight", expert * columns + column, 4)
            text += f"""
    ld.global.nc.v4.b16 {own}, [address+{2 * (expert * width + column)}];"""
    return text


def load_row(s: Shape) -> str:
    """Load a thread's columns of row `own_row`, as other programs have written it."""
    columns = _columns(s)
    text = f"""
    mul.lo.u32 a, own_row, {s.groups * GROUP};
    mad.lo.u32 a, thread, {columns}, a;
    mov.b64 base, %x;
    mad.wide.u32 address, a, 4, base;"""
    for column in range(0, columns, 4):
        own = registers("x_of", column, 4)
        text += f"\n    ld.global.v4.f32 {own}, [address+{4 * column}];"
    return text


def add_logits(s: Shape) -> str:
    """Add up a warp's part of a program's logits, for every row."""
    columns = _columns(s)
    text = f"""
    mov.u32 turn, 0;
LOGITS:
    setp.ge.u32 p, piece, {s.routing.experts // LOGITS};
    @p bra ROUTED;
LOGITS_OF_ROW:"""
    for expert in range(LOGITS):
        text += f"\n    mov.f32 sum{expert}, {number(0.0)};"
        for column in range(columns):
            text += f"""
    cvt.f32.f16 f, weight{expert * columns + column};
    fma.rn.f32 sum{expert}, f, x_of{column}, sum{expert};"""
    text += add_up(LOGITS) + divide("a", "lane", LANES // LOGITS)
    text += f"""
    mad.lo.u32 a, own_row, {LOGITS}, a;
    mad.lo.u32 a, a, {WARPS}, warp;
    mad.lo.u32 a, a, 4, shared;
    mad.lo.u32 a, turn, {s.logits_each}, a;
    and.b32 b, lane, {LANES // LOGITS - 1};
    setp.eq.u32 p, b, 0;
    @p st.shared.f32 [a+{s.logits}], sum0;
    add.u32 own_row, own_row, 1;
    setp.ge.u32 p, own_row, {s.rows};
    @p bra ADDED;"""
    text += load_row(s)
    text += """
    bra LOGITS_OF_ROW;
ADDED:
    mad.lo.u32 bar, turn, 8, shared;"""
    text += arrive(s.added)
    text += f"""
    add.u32 turn, turn, 1;
    add.u32 piece, piece, {s.programs};"""
    text += load_router(s) + "\n    mov.u32 own_row, 0;" + load_row(s)
    return text + "\n    bra LOGITS;\nROUTED:"


def write_probabilities(s: Shape) -> str:
    """Write the probabilities of a program's experts, a lane one of a row."""
    count, experts = s.rows * LOGITS, s.routing.experts
    text = f"""
    mov.u32 piece, %ctaid.x;
    mov.u32 turn, 0;
    min.u32 own_row, lane, {count - 1};
PROBABILITIES:
    setp.ge.u32 p, piece, {experts // LOGITS};
    @p bra WRITTEN;
    and.b32 a, own_row, {LOGITS - 1};
    mad.lo.u32 chosen, piece, {LOGITS}, a;"""
    if not s.routing.hashed:
        text += """
    mov.b64 base, %bias_or_ids;
    mad.wide.u32 address, chosen, 4, base;
    ld.global.nc.f32 picked, [address];"""
    text += "\n    mad.lo.u32 bar, turn, 8, shared;"
    text += wait("LOGITS_ADDED", f"bar+{s.added}", "0")
    text += f"""
    mad.lo.u32 a, own_row, {4 * WARPS}, shared;
    mad.lo.u32 a, turn, {s.logits_each}, a;"""
    text += add_shared("f", "g", "a", s.logits, WARPS, 4)
    text += divide("b", "own_row", LOGITS)
    text += f"""
    mad.lo.u32 b, b, {experts}, chosen;
    setp.lt.u32 p, lane, {count};"""
    text += _probability()
    text += """
    mov.b64 base, %probabilities;
    mad.wide.u32 address, b, 4, base;
    @p st.global.f32 [address], f;"""
    if not s.routing.hashed:
        # Keys are in the order of biased probabilities, as numbers without a sign.
        text += """
    add.rn.f32 f, f, picked;
    mov.b32 a, f;
    shr.s32 c, a, 31;
    or.b32 c, c, 0x80000000;
    xor.b32 a, a, c;
    mov.b64 base, %keys;
    mad.wide.u32 address, b, 4, base;
    @p st.global.b32 [address], a;"""
    text += "\n    mov.b64 base, %counters;" + s.routed.count("[base]")
    return (
        text
        + f"""
    add.u32 turn, turn, 1;
    add.u32 piece, piece, {s.programs};
    bra PROBABILITIES;
WRITTEN:"""
    )


def _probability() -> str:
    """Leave the root of the softplus of `f` there."""
    text = "\n    abs.f32 g, f;" + exponential("g", "g", -1)
    text += f"""
    add.rn.f32 ratio, g, {number(2.0)};
    div.rn.f32 ratio, g, ratio;
    mul.rn.f32 power, ratio, ratio;
    mov.f32 g, {number(1 / (2 * _TERMS - 1))};"""
    for term in reversed(range(_TERMS - 1)):
        text += f"\n    fma.rn.f32 g, g, power, {number(1 / (2 * term + 1))};"
    return (
        text
        + f"""
    mul.rn.f32 g, g, ratio;
    max.f32 f, f, {number(0.0)};
    fma.rn.f32 f, g, {number(2.0)}, f;
    sqrt.rn.f32 f, f;"""
    )


def choose(s: Shape) -> str:
    """Choose experts: a warp of CHOOSERS for every third row."""
    text = f"""
    sub.u32 row, {WARPS + CHOOSERS}, warp;
CHOOSE:
    setp.ge.u32 p, row, {s.rows};
    @p bra CHOSEN;"""
    text += _known(s) if s.routing.hashed else _best(s)
    text += _own_slot(s)
    text += f"""
    setp.lt.u32 p, lane, {s.each};
    @p st.shared.b32 [b+{s.chosen}], chosen;
    mov.u32 b, %ctaid.x;
    setp.eq.and.u32 p, b, 0, p;
    mov.b64 base, %ids;
    mad.wide.u32 address, a, 4, base;"""
    text += store_row("chosen", "p", "row", s.rows, s.copied_rows, 4 * s.each)
    return (
        text
        + f"""
    add.u32 row, row, {CHOOSERS};
    bra CHOOSE;
CHOSEN:"""
    )


def _own_slot(s: Shape) -> str:
    """Find a lane's place among the experts of all rows, `a`, and in memory, `b`."""
    return f"""
    min.u32 a, lane, {s.each - 1};
    mad.lo.u32 a, row, {s.each}, a;
    mad.lo.u32 b, a, 4, shared;"""


def _known(s: Shape) -> str:
    """Read a row's experts."""
    return (
        _own_slot(s)
        + """
    mov.b64 base, %bias_or_ids;
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.b32 chosen, [address];"""
    )


def _best(s: Shape) -> str:
    """Choose a row's experts: the best ones, the first of those that are as good."""
    keys, experts = _keys(s), s.routing.experts
    text = _await(s)
    text += f"""
    mad.lo.u32 a, row, {experts}, lane;
    mov.b64 base, %keys;
    mad.wide.u32 address, a, 4, base;"""
    for i in range(keys):
        guard = ""
        if experts < LANES * (i + 1):
            text += f"""
    mov.b32 key{i}, 0;
    setp.lt.u32 p, lane, {experts % LANES};"""
            guard = "@p "
        text += f"\n    {guard}ld.global.b32 key{i}, [address+{4 * LANES * i}];"
    for i in range(keys):
        text += f"\n    add.u32 own{i}, lane, {LANES * i};"
    text += """
    mov.u32 turn, 0;
    mov.u32 chosen, 0;
BEST:
    mov.u32 a, key0;"""
    for i in range(1, keys):
        text += f"\n    max.u32 a, a, key{i};"
    text += f"""
    redux.sync.max.u32 b, a, 0xffffffff;
    mov.u32 c, {LANES * keys};"""
    for i in reversed(range(keys)):
        text += f"""
    setp.eq.u32 p, key{i}, b;
    selp.b32 c, own{i}, c, p;"""
    text += "\n    redux.sync.min.u32 c, c, 0xffffffff;"
    for i in range(keys):
        text += f"""
    setp.eq.u32 p, c, own{i};
    selp.b32 key{i}, 0, key{i}, p;"""
    return (
        text
        + f"""
    setp.eq.u32 p, lane, turn;
    selp.b32 chosen, c, chosen, p;
    add.u32 turn, turn, 1;
    setp.lt.u32 p, turn, {s.each};
    @p bra BEST;"""
    )


def _await(s: Shape) -> str:
    """Wait until all probabilities are there."""
    return "\n    mov.b64 base, %counters;" + s.routed.wait("ROUTING", "[base]")


def weigh(s: Shape) -> str:
    """Find the shares of a warp's rows, while the experts' weights are on their way."""
    text = f"""
    sub.u32 row, {WARPS + CHOOSERS}, warp;
    bar.warp.sync 0xffffffff;
WEIGH:
    setp.ge.u32 p, row, {s.rows};
    @p bra WEIGHED;"""
    if s.routing.hashed:
        text += _await(s)
    text += _own_slot(s)
    text += f"""
    ld.shared.b32 a, [b+{s.chosen}];
    mad.lo.u32 a, row, {s.routing.experts}, a;
    mov.b64 base, %probabilities;
    mad.wide.u32 address, a, 4, base;
    ld.global.f32 picked, [address];
    setp.lt.u32 p, lane, {s.each};
    selp.f32 picked, picked, {number(0.0)}, p;
    mov.f32 f, picked;"""
    for bit in (2**i for i in range((s.each - 1).bit_length())):
        text += add_lanes("f", "g", bit)
    text += f"""
    max.f32 f, f, {number(s.routing.smallest)};
    div.rn.f32 g, picked, f;
    mul.rn.f32 g, g, {number(s.routing.scale)};
    @p st.shared.f32 [b+{s.shares}], g;
    add.u32 row, row, {CHOOSERS};
    bra WEIGH;
WEIGHED:
    mov.u32 bar, shared;"""
    return text + arrive(s.weighed)
