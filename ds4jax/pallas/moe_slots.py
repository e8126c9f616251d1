"""How warps of `moe_ptx`'s programs share memory: copies, and waits, in PTX.

There are two slots of each kind, which tasks take in turn, and two barriers for each
thing to wait for: a task's is that of its number.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.moe_shape import HALF, HIDDEN, SKEW, TABLE, WARPS, Shape
from ds4jax.pallas.ptx import Piece, arrive, copy, wait

_BETWEEN = f"\n    add.u32 c, c, {HALF};"
"""What comes between halves that are rows."""


def wait_for(label: str, barrier: int, task: str, ago: int = 0) -> str:
    """Wait for what a task had to wait for, or the task `ago` before it.

    Before the first two there is nothing to wait for: a new barrier is in phase 0, as
    if phase 1 had ended.
    """
    return f"""
    sub.u32 before, {task}, {ago};
    and.b32 a, before, 1;
    mad.lo.u32 bar, a, 8, shared;
    add.u32 bar, bar, {barrier};
    shr.u32 phase, before, 1;
    and.b32 phase, phase, 1;""" + wait(label, "bar", "phase")


def tell(barrier: int, task: str) -> str:
    """Say that this warp is done with what others wait for."""
    return f"""
    and.b32 a, {task}, 1;
    mad.lo.u32 bar, a, 8, shared;""" + arrive(barrier)


def wait_for_half(s: Shape, label: str, half: int) -> str:
    """Wait until a half of the weights of task `number` is `here`."""
    return (
        wait_for(label, s.copied + 16 * half, "number")
        + f"""
    and.b32 a, number, 1;
    mad.lo.u32 here, a, {s.slot}, shared;
    add.u32 here, here, {TABLE};"""
    )


def wait_for_weights(s: Shape, label: str) -> str:
    """Wait until all weights of task `number` are `here`."""
    return "".join(wait_for_half(s, f"{label}_{half}", half) for half in range(2))


def each_shexp_task(s: Shape, label: str, body: str) -> str:
    """Do something for a program's tasks of the shared expert's gate and up.

    From `tile` on, which is the first one's, and counted by `number`.
    """
    return f"""
{label}:
    setp.ge.u32 p, tile, {s.shexp_tasks};
    @p bra {label}_ENDED;{body}
    add.u32 number, number, 1;
    add.u32 tile, tile, {s.programs};
    bra {label};
{label}_ENDED:"""


def copy_gated(s: Shape) -> str:
    """Copy gate and up of `expert` for `tile`."""
    last, _ = s.gated_planes[-1]
    pieces = [
        Piece(f"{weight}_{name}", "c", own // HALF, own, SKEW if name == last else 0)
        for weight in ("gate", "up")
        for name, own in s.gated_planes
    ]
    return f"""
    mul.lo.u32 c, tile, {GROUP};
    mad.lo.u32 c, expert, {HIDDEN}, c;""" + _halves(
        s, "GATED", pieces, _BETWEEN, pieces
    )


def copy_shexp_gated(s: Shape, between: str) -> str:
    """Copy task `tile` of the shared expert's gate, do what is between, and copy up."""
    gate, up = (
        [
            Piece(f"shexp_{weight}_{name}", "c", size // WARPS, size)
            for name, size in s.shexp_gated_planes
        ]
        for weight in ("gate", "up")
    )
    return f"""
    mul.lo.u32 c, tile, {WARPS};""" + _halves(s, "SHEXP_GATED", gate, between, up)


def copy_shexp(s: Shape) -> str:
    """Copy `block` of the shared expert's down."""
    d, quants = (
        Piece(f"shexp_{name}", "c", size // GROUP, size)
        for name, size in s.shexp_planes
    )
    half = quants._replace(nbytes=quants.nbytes // 2)
    return f"""
    mul.lo.u32 c, block, {GROUP};""" + _halves(s, "SHEXP", [d, half], _BETWEEN, [half])


def copy_experts(s: Shape) -> str:
    """Copy `block` of down of the `chosen` experts."""
    chosen = [f"chosen{i}" for i in range(s.at_once)]
    text = f"\n    mul.lo.u32 c, block, {GROUP};"
    for expert in chosen:
        text += f"\n    mad.lo.u32 {expert}, {expert}, {s.out}, c;"
    pieces = [
        Piece(name, expert, size // GROUP, size)
        for expert in chosen
        for name, size in s.down_planes
    ]
    half = len(pieces) // 2
    return text + _halves(s, "EXPERTS", pieces[:half], "", pieces[half:])


def copy_hidden(s: Shape) -> str:
    """Copy the hidden values of a task, `stage`: of experts from `pair` on."""
    pieces = [Piece(name, "pair", size, s.at_once * size) for name, size in s.hidden]
    return _next("stage", s.arrived, s.stage, s.staged) + copy("to", pieces)


def _halves(
    s: Shape,
    label: str,
    first: Sequence[Piece],
    between: str,
    second: Sequence[Piece],
) -> str:
    """Copy the weights of task `number`, one half after the other.

    Only one half is on its way: whatever else a multiprocessor asks memory for is
    queued behind it.
    """
    return (
        wait_for(f"{label}_BEFORE", s.copied + 16, "number", 1)
        + _next("number", s.copied, s.slot, TABLE)
        + copy("to", first)
        + between
        + wait_for(f"{label}_HALF_BEFORE", s.copied, "number")
        + "\n    add.u32 bar, bar, 16;"
        + copy("to", second)
    )


def _next(task: str, barriers: int, size: int, start: int) -> str:
    """Find the barrier of a task, `bar`, and the slot of such a size, `to`."""
    return f"""
    and.b32 b, {task}, 1;
    mad.lo.u32 bar, b, 8, shared;
    add.u32 bar, bar, {barriers};
    mad.lo.u32 to, b, {size}, shared;
    add.u32 to, to, {start};"""
