"""Down in `moe_ptx`'s programs, in PTX: what they multiply, and when.

A program takes block after block of GROUP rows: of the shared expert's down for all
rows, then of the experts that a row chose, some of them at a time.  The shared expert's
turn comes while other programs still multiply gate and up.
"""

from __future__ import annotations

from ds4jax.pallas import matrix_units
from ds4jax.pallas import moe_slots as slots
from ds4jax.pallas.down_arithmetic import (
    add_experts,
    multiply_shexp,
    read_shares,
    read_shexp,
)
from ds4jax.pallas.fixed_point import GROUP
from ds4jax.pallas.matrix_units import LINES, PARTS
from ds4jax.pallas.moe_shape import DOWN_ROWS, ORDER, WARPS, Shape
from ds4jax.pallas.ptx import LANES, add_shared, add_up, divide, number, store_row, wait


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
        + _store_shexp(s)
        + f"""
    add.u32 own_row, own_row, 1;
    setp.lt.u32 p, own_row, {s.rows};
    @p bra SHEXP;"""
        + slots.tell(s.settled, "number")
        + """
    add.u32 number, number, 1;
    mov.u32 own_row, 0;
    mov.u32 pair, 0;"""
        + matrix_units.clear(s.limbs, 4 * ORDER.levels)
        + "\nROW:"
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
        + add_up(DOWN_ROWS, PARTS)
        + _store_routed(s)
        + f"""
    add.u32 own_row, own_row, 1;
    setp.lt.u32 p, own_row, {s.rows};
    @p bra ROW;
    add.u32 block, block, {s.programs};
    bra DOWN;"""
    )


def _store(s: Shape, operand: str) -> str:
    """Write `sum0` of lanes with `p`, of row `a` of the block.

    For copies of the last row of activations too.
    """
    text = f"""
    mad.lo.u32 a, block, {GROUP}, a;
    mad.lo.u32 a, own_row, {s.out}, a;
    mov.b64 base, %{operand};
    mad.wide.u32 address, a, 4, base;"""
    return text + store_row("sum0", "p", "own_row", s.rows, s.copied_rows, 4 * s.out)


def _store_shexp(s: Shape) -> str:
    """Write the sums of a warp's rows."""
    each = LANES // DOWN_ROWS
    text = f"""
    and.b32 a, lane, {each - 1};
    setp.eq.u32 p, a, 0;"""
    text += divide("a", "lane", each)
    text += f"\n    mad.lo.u32 a, warp, {DOWN_ROWS}, a;"
    return text + _store(s, "to_shexp")


def _store_routed(s: Shape) -> str:
    """Add up what warps have of rows, by two buffers in turn, and write that."""
    text = f"""
    add.u32 b, shared, buffer;
    xor.b32 buffer, buffer, {s.exchanged};
    mad.lo.u32 a, warp, {GROUP}, own_line;
    mad.lo.u32 a, own_part, {LINES}, a;
    mad.lo.u32 a, a, 4, b;
    st.shared.f32 [a+{s.values}], sum0;"""
    text += s.place.meet(WARPS)
    text += """
    setp.ne.u32 p, warp, 0;
    @p bra STORED;
    mad.lo.u32 b, lane, 4, b;"""
    text += add_shared("sum0", "f", "b", s.values, WARPS, 4 * GROUP)
    text += """
    mov.u32 a, lane;
    setp.eq.u32 p, lane, lane;"""
    text += _store(s, "to_routed")
    return text + "\nSTORED:"
