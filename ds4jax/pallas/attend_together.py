"""Parts of attention put together in `attn_out`'s programs, in PTX.

Each warp takes groups of a head's result, every so many: it weighs the parts by their
peaks and the sink, rotates back and writes fixed point.  All programs then wait for
each other.
"""

from __future__ import annotations

from ds4jax.pallas.attend_shape import WARPS, Shape
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.ptx import BITS, Place, add_lanes, divide, exponential, number
from ds4jax.pallas.ptx_fixed_point import Counter, fix, store_words


def put_together(s: Shape, place: Place) -> str:
    """Return the text: it ends when all results are there."""
    # Channels that are rotated begin with one of these groups.
    first = s.pieces - s.turned // GROUP
    of_group = s.heads // s.groups
    text = f"""
    mov.u32 a, %ctaid.x;
    mad.lo.u32 task, warp, {s.programs}, a;
JOIN:
    setp.ge.u32 p, task, {s.units};
    @p bra JOINED;{divide("b", "task", s.pieces)}
    mul.lo.u32 a, b, {s.pieces};
    sub.u32 other, task, a;{divide("row", "b", s.heads)}
    mul.lo.u32 a, row, {s.heads};
    sub.u32 att_heads, b, a;"""
    text += _load(s)
    text += _shares(s)
    text += "\n    shfl.sync.idx.b32 g, att_peak0, 0, 31, 0xffffffff;"
    text += "\n    mul.rn.f32 f, att_sum0, g;"
    for part in range(1, s.parts):
        text += f"""
    shfl.sync.idx.b32 g, att_peak0, {part}, 31, 0xffffffff;
    fma.rn.f32 f, att_sum{part}, g, f;"""
    text += f"""
    setp.lt.u32 p, other, {first};
    @p bra TURNED;
    sub.u32 a, other, {first};
    mul.lo.u32 a, a, {GROUP};
    mad.lo.u32 a, row, {s.turned}, a;
    add.u32 a, a, lane;
    mov.b64 base, %cos;
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.f32 att_cos0, [address];
    mov.b64 base, %sin;
    mad.wide.u32 address, a, 4, base;
    ld.global.nc.f32 att_sin0, [address];
    shfl.sync.bfly.b32 g, f, 1, 31, 0xffffffff;
    mul.rn.f32 g, g, att_sin0;
    neg.f32 g, g;
    fma.rn.f32 f, f, att_cos0, g;
TURNED:"""
    text += fix(s.dtype)
    text += f"""{divide("a", "att_heads", of_group)}
    mul.lo.u32 b, a, {of_group};
    sub.u32 b, att_heads, b;
    mad.lo.u32 b, b, {s.pieces}, other;
    mad.lo.u32 a, row, {s.groups}, a;
    mad.lo.u32 att_to, a, {s.columns // GROUP}, b;
    mov.b64 base, %scale;
    mad.wide.u32 address, att_to, 4, base;
    @first st.global.f32 [address], unit;
    mad.lo.u32 att_to, a, {s.limbs * s.columns // GROUP}, b;
    mul.lo.u32 att_to, att_to, {GROUP};
    add.u32 att_to, att_to, lane;
    mov.b64 base, %words;
    mad.wide.u32 address, att_to, 1, base;"""
    text += store_words(s.limbs, "address", s.columns)
    text += f"""
    add.u32 task, task, {WARPS * s.programs};
    bra JOIN;
JOINED:"""
    return text + await_programs(s.joined, s.programs, place, s.at_joined, "JOINED")


def await_programs(
    counter: Counter, counted: int, place: Place, at: int, label: str
) -> str:
    """Have all programs wait until the first of them have done what comes before.

    Args:
      counter: counts them.
      counted: how many.
      place: where it is, so many bytes further on.
      at: those.
      label: for labels.
    """
    own = f"[base+{place.counters + at}]"
    return (
        place.meet(WARPS)
        + f"""
    setp.ne.u32 p, warp, {WARPS - 1};
    @p bra {label}_KNOWN;
    mov.b64 base, %counters;
    mov.u32 a, %ctaid.x;
    setp.ge.u32 p, a, {counted};
    @p bra {label}_COUNTED;"""
        + counter.count(own)
        + f"\n{label}_COUNTED:"
        + counter.wait(f"{label}_WAIT", own)
        + f"\n{label}_KNOWN:"
        + place.meet(WARPS)
    )


def _load(s: Shape) -> str:
    """Load a group's sums of all parts, and a head's peak and total of a lane's part.

    They are read as other programs have written them: not through the read-only cache.
    """
    text = f"""
    mul.lo.u32 a, b, {s.width};
    mad.lo.u32 a, other, {GROUP}, a;
    add.u32 a, a, lane;
    mov.b64 base, %summed;
    mad.wide.u32 address, a, 4, base;"""
    each = s.rows * s.heads
    for part in range(s.parts):
        at = 4 * part * each * s.width
        text += f"\n    ld.global.f32 att_sum{part}, [address+{at}];"
    text += f"""
    min.u32 a, lane, {s.parts - 1};
    mad.lo.u32 a, a, {each}, b;"""
    for name in ("peak", "total"):
        text += f"""
    mov.b64 base, %{name};
    mad.wide.u32 address, a, 4, base;
    ld.global.f32 att_{name}0, [address];"""
    return (
        text
        + """
    mov.b64 base, %sinks;
    mad.wide.u32 address, att_heads, 4, base;
    ld.global.nc.f32 att_sink, [address];"""
    )


def _shares(s: Shape) -> str:
    """Find what a lane's part is multiplied by, in `att_peak0`."""
    text = """
    max.f32 f, att_peak0, att_sink;"""
    for bit in BITS:
        text += f"""
    shfl.sync.bfly.b32 g, f, {bit}, 31, 0xffffffff;
    max.f32 f, f, g;"""
    text += "\n    neg.f32 f, f;"
    for value in ("att_peak0", "att_sink"):
        text += f"""
    add.rn.f32 {value}, {value}, f;""" + exponential(value, value)
    text += f"""
    setp.lt.u32 p, lane, {s.parts};
    selp.f32 att_peak0, att_peak0, {number(0.0)}, p;
    mul.rn.f32 f, att_peak0, att_total0;"""
    for bit in BITS:
        text += add_lanes("f", "g", bit)
    return (
        text
        + """
    add.rn.f32 f, f, att_sink;
    div.rn.f32 att_peak0, att_peak0, f;"""
    )
