"""Warps of `moe_ptx`'s programs that do not multiply, in PTX: what they do, and when.

One has weights copied, one writes hidden values, one has them copied for down.  What
multiplies is then never held up by memory, nor by other programs.
"""

from __future__ import annotations

from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.iq2_arithmetic import finish
from ds4jax.pallas.moe_shape import THREADS, WARPS, Shape
from ds4jax.pallas.ptx import start_barriers


def next_task(s: Shape) -> str:
    """Go on to a program's next task of gate and up.

    Task n of program p is tile `t % tiles` of pair `t / tiles`, t = p + n programs: the
    hidden values of the first pairs are there when down begins.
    """
    return f"""
    add.u32 tile, tile, {s.programs % s.tiles};
    add.u32 pair, pair, {s.programs // s.tiles};
    setp.ge.u32 p, tile, {s.tiles};
    @p sub.u32 tile, tile, {s.tiles};
    @p add.u32 pair, pair, 1;"""


def service(s: Shape) -> str:
    """Return the text, from the label SERVICE on; it ends at END."""
    return (
        f"""
SERVICE:
    setp.ne.u32 p, warp, {WARPS};
    @p bra OTHERS;"""
        + _weights(s)
        + f"""
OTHERS:
    bar.sync 0, {THREADS};
    setp.eq.u32 p, warp, {WARPS + 1};
    @p bra WRITE;
    setp.ne.u32 p, warp, {WARPS + 2};
    @p bra END;"""
        + _hidden(s)
        + _write(s)
    )


def _weights(s: Shape) -> str:
    """Have the weights of all tasks copied, as soon as there is room."""
    text = _ids(s, 1)
    text += start_barriers(s.barriers)
    text += f"""
    bar.warp.sync 0xffffffff;
    bar.arrive 0, {THREADS};
COPY_GATED:
    setp.ge.u32 p, pair, {s.pairs};
    @p bra COPY_BLOCK;
    mov.u32 expert, chosen0;"""
    text += slots.wait_for("GATED_ROOM", s.settled, "number", 2)
    text += slots.copy_gated(s) + next_task(s)
    text += (
        _ids(s, 1)
        + f"""
    add.u32 number, number, 1;
    bra COPY_GATED;
COPY_BLOCK:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;"""
    )
    text += slots.wait_for("SHEXP_ROOM", s.settled, "number", 2) + slots.copy_shexp(s)
    text += """
    add.u32 number, number, 1;
    mov.u32 pair, 0;
COPY_EXPERTS:"""
    text += _ids(s, s.at_once)
    text += slots.wait_for("EXPERTS_ROOM", s.settled, "number", 2)
    return (
        text
        + slots.copy_experts(s)
        + _next_experts(s, "number", "COPY_EXPERTS", "COPY_BLOCK")
    )


def _next_experts(s: Shape, count: str, experts: str, block: str) -> str:
    """Go on to a block's next experts, or to the next block."""
    return f"""
    add.u32 {count}, {count}, 1;
    add.u32 pair, pair, {s.at_once};
    setp.lt.u32 p, pair, {s.pairs};
    @p bra {experts};
    add.u32 block, block, {s.programs};
    bra {block};"""


def _ids(s: Shape, count: int) -> str:
    """Read which experts `pair` and those after it are, or the last pairs."""
    text = f"""
    min.u32 a, pair, {s.pairs - count};
    mov.b64 base, %ids;
    mad.wide.u32 address, a, 4, base;"""
    for i in range(count):
        text += f"\n    ld.global.nc.b32 chosen{i}, [address+{4 * i}];"
    return text


def _write(s: Shape) -> str:
    """Write what tasks of gate and up found, and count them."""
    return (
        f"""
WRITE:
    setp.ge.u32 p, pair, {s.pairs};
    @p bra END;"""
        + slots.wait_for("FOUND", s.settled, "number")
        + finish(s)
        + next_task(s)
        + """
    add.u32 number, number, 1;
    bra WRITE;"""
    )


def _hidden(s: Shape) -> str:
    """Have hidden values copied, once all of a task's have been written.

    The copy engine is no thread, and has to be told that there is something new.
    """
    return (
        f"""
    mov.u32 stage, 0;
HIDDEN_BLOCK:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;
    mov.u32 pair, 0;
HIDDEN:
    div.u32 a, pair, {s.at_once};
    mov.b64 base, %finished;
    mad.wide.u32 address, a, 4, base;"""
        + s.counter.wait("FINISHED", "[address]")
        + """
    fence.proxy.async;"""
        + slots.wait_for("HIDDEN_ROOM", s.used, "stage", 2)
        + slots.copy_hidden(s)
        + _next_experts(s, "stage", "HIDDEN", "HIDDEN_BLOCK")
    )
