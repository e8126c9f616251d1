"""Warps of `moe_ptx`'s programs that do not multiply, in PTX: what they do, and when.

One has weights copied.  The others choose experts; then one writes hidden values, one
has them copied for down, and one puts those of the shared expert into fixed point.
What multiplies is then never held up by memory, nor, but where values are exchanged, by
other programs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.iq2_arithmetic import finish
from ds4jax.pallas.moe_router import choose, weigh, write_probabilities
from ds4jax.pallas.moe_shape import (
    LOGITS,
    SERVICE,
    THREADS,
    WARPS,
    Shape,
)
from ds4jax.pallas.moe_shexp import fix_hidden, write_gated
from ds4jax.pallas.ptx import LANES, divide, start_barriers, wait


def first_task(s: Shape) -> str:
    """Go on to a program's first task of the routed experts' gate and up.

    Task n of program p is tile `t % tiles` of pair `t / tiles`, t = p + n programs: the
    hidden values of the first pairs are there when down begins.
    """
    return f"""
    mov.u32 a, %ctaid.x;{divide("pair", "a", s.tiles)}
    and.b32 tile, a, {s.tiles - 1};"""


def next_task(s: Shape) -> str:
    """Go on to a program's next task."""
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
        + _shexp_weights(s)
        + f"""
    bra COPY;
OTHERS:
    bar.sync 0, {THREADS};
    setp.ne.u32 p, warp, {WARPS + 1};
    @p bra CHOICE;"""
        + write_probabilities(s)
        + "\nCHOICE:"
        + choose(s)
        + f"""
    bar.arrive 1, {SERVICE * LANES};"""
        + weigh(s)
        + f"""
    setp.eq.u32 p, warp, {WARPS + 1};
    @p bra WRITE;
    setp.eq.u32 p, warp, {WARPS + 2};
    @p bra HIDDEN_VALUES;"""
        + fix_hidden(s)
        + _routed_weights(s)
        + _hidden(s)
        + _write(s)
    )


def _shexp_weights(s: Shape) -> str:
    """Set barriers up and have the weights of the shared expert's tasks copied.

    What the multiplying warps load first is on its way by then.  What they make of it,
    for which all programs wait, goes before all but half of a task: on an H200 a layer
    takes 30.8 us if it goes before all, 29.7 so, and no less if before none.
    """
    text = start_barriers(s.barriers)
    text += f"""
    bar.warp.sync 0xffffffff;
    bar.sync 0, {THREADS};
    mov.u32 tile, %ctaid.x;"""
    task = slots.wait_for("SHEXP_GATED_ROOM", s.settled, "number", 2)
    task += slots.copy_shexp_gated(s, _await_router(s))
    return text + slots.each_shexp_task(s, "COPY_SHEXP", task)


def _await_router(s: Shape) -> str:
    """Wait until a program's first logits are there, if it has any to compute."""
    text = f"""
    mov.u32 a, %ctaid.x;
    setp.ge.u32 p, a, {s.routing.experts // LOGITS};
    @p bra ROUTER_USED;"""
    return text + wait("ROUTER_READ", f"shared+{s.added}", "0") + "\nROUTER_USED:"


def _routed_weights(s: Shape) -> str:
    """Have those of gate and up copied once rows have chosen, then those of down."""
    text = f"""
COPY:
    bar.sync 1, {SERVICE * LANES};"""
    text += first_task(s)
    text += f"""
COPY_GATED:
    setp.ge.u32 p, pair, {s.pairs};
    @p bra COPY_BLOCK;"""
    text += _ids(s, ["expert"])
    text += slots.wait_for("GATED_ROOM", s.settled, "number", 2)
    text += slots.copy_gated(s) + next_task(s)
    text += f"""
    add.u32 number, number, 1;
    bra COPY_GATED;
COPY_BLOCK:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;"""
    text += slots.wait_for("SHEXP_ROOM", s.settled, "number", 2) + slots.copy_shexp(s)
    text += """
    add.u32 number, number, 1;
    mov.u32 pair, 0;
COPY_EXPERTS:"""
    text += _ids(s, [f"chosen{i}" for i in range(s.at_once)])
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


def _ids(s: Shape, experts: Sequence[str]) -> str:
    """Read which experts `pair` and those after it are."""
    text = "\n    mad.lo.u32 a, pair, 4, shared;"
    for i, expert in enumerate(experts):
        text += f"\n    ld.shared.b32 {expert}, [a+{s.chosen + 4 * i}];"
    return text


def _write(s: Shape) -> str:
    """Write what tasks of gate and up found, and count them."""
    return (
        "\nWRITE:"
        + write_gated(s)
        + first_task(s)
        + f"""
WRITE_GROUP:
    setp.ge.u32 p, pair, {s.pairs};
    @p bra END;"""
        + slots.wait_for("FOUND", s.settled, "number")
        + finish(s)
        + next_task(s)
        + """
    add.u32 number, number, 1;
    bra WRITE_GROUP;"""
    )


def _hidden(s: Shape) -> str:
    """Have the routed experts' hidden values copied, once all of a task's are written.

    Those of the shared expert are read as they are, once they are in fixed point.

    The copy engine is no thread, and has to be told that there is something new.
    """
    return (
        f"""
HIDDEN_VALUES:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;
    mov.b64 base, %counters;"""
        + s.fixed.wait("SHEXP_FIXED", f"[base+{s.at_fixed}]")
        + f"""
    @first mbarrier.arrive.shared::cta.b64 _, [shared+{s.shexp_fixed}];
    mov.u32 stage, 0;
HIDDEN_BLOCK:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;
    mov.u32 pair, 0;
HIDDEN:
    div.u32 a, pair, {s.at_once};
    mov.b64 base, %counters;
    mad.wide.u32 address, a, 4, base;"""
        + s.finished.wait("FINISHED", f"[address+{s.at_finished}]")
        + """
    fence.proxy.async;"""
        + slots.wait_for("HIDDEN_ROOM", s.used, "stage", 2)
        + slots.copy_hidden(s)
        + _next_experts(s, "stage", "HIDDEN", "HIDDEN_BLOCK")
    )
