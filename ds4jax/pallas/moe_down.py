"""Down in `moe_ptx`'s programs, in PTX: what they multiply, and when.

A program takes block after block of GROUP rows: of the shared expert's down for all
rows, then of the experts that a row chose, some of them at a time.  The shared expert's
turn comes while other programs still multiply gate and up.
"""

from __future__ import annotations

from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.down_arithmetic import (
    add_experts,
    multiply_shexp,
    read_shares,
    read_shexp,
)
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.moe_shape import DOWN_ROWS, Shape
from ds4jax.pallas.ptx import LANES, add_up, divide, number, store_row, wait


def down(s: Shape) -> str:
    """Return the text, from the label DOWN on; it ends at END."""
    return (
        f"""
DOWN:
    setp.ge.u32 p, block, {s.blocks};
    @p bra END;"""
        + wait("SHARES_THERE", f"shared+{s.weighed}", "0")
        + wait("SHEXP_FIXED_THERE", f"shared+{s.shexp_fixed}", "0")
        + slots.wait_for_weights(s, "SHEXP_COPIED")
        + """
    mov.u32 own_row, 0;
SHEXP:"""
        + read_shexp(s)
        + multiply_shexp(s)
        + add_up(DOWN_ROWS)
        + _store(s, "to_shexp")
        + f"""
    add.u32 own_row, own_row, 1;
    setp.lt.u32 p, own_row, {s.rows};
    @p bra SHEXP;"""
        + slots.tell(s.settled, "number")
        + """
    add.u32 number, number, 1;
    mov.u32 own_row, 0;
    mov.u32 pair, 0;
ROW:"""
        + "".join(f"\n    mov.f32 sum{row}, {number(0.0)};" for row in range(DOWN_ROWS))
        + "\nEXPERTS:"
        + read_shares(s)
        + slots.wait_for("HIDDEN_THERE", s.arrived, "stage")
        + slots.wait_for_weights(s, "EXPERTS_COPIED")
        + add_experts(s)
        + slots.tell(s.settled, "number")
        + slots.tell(s.used, "stage")
        + f"""
    add.u32 number, number, 1;
    add.u32 stage, stage, 1;
    rem.u32 a, pair, {s.each};
    setp.ne.u32 p, a, 0;
    @p bra EXPERTS;"""
        + add_up(DOWN_ROWS)
        + _store(s, "to_routed")
        + f"""
    add.u32 own_row, own_row, 1;
    setp.lt.u32 p, own_row, {s.rows};
    @p bra ROW;
    add.u32 block, block, {s.programs};
    bra DOWN;"""
    )


def _store(s: Shape, operand: str) -> str:
    """Write the sums of a warp's rows, for copies of the last row too."""
    each = LANES // DOWN_ROWS
    text = divide("a", "lane", each)
    text += f"""
    mad.lo.u32 a, warp, {DOWN_ROWS}, a;
    mad.lo.u32 a, block, {GROUP}, a;
    mad.lo.u32 a, own_row, {s.out}, a;
    mov.b64 base, %{operand};
    mad.wide.u32 address, a, 4, base;
    and.b32 a, lane, {each - 1};
    setp.eq.u32 p, a, 0;"""
    return text + store_row("sum0", "p", "own_row", s.rows, s.copied_rows, 4 * s.out)
