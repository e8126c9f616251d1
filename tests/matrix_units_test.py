"""Products of bytes on matrix units, run by the tests' own machine, and that machine's.

What a GPU makes of the same instructions is tested in `gpu_test.py`.
"""

import itertools

import numpy as np
import pytest
from ptx_instructions import MULTIPLY
from ptx_machine import LANES, Machine

from ds4jax.pallas import matrix_units
from ds4jax.pallas.matrix_units import LINES, PARTS
from ds4jax.pallas.ptx import begin, bind, registers

BYTES = {"s8": np.int8, "u8": np.uint8}
TIMES = 7
"""A number by which two limbs' sums of 32 products do not leave 32 bits."""
same = np.testing.assert_array_equal


def drawn(seed: int, kind: str, *shape: int) -> np.ndarray:
    """Return bytes of a kind, the least and the most among them."""
    ends = np.iinfo(BYTES[kind])
    draw = np.random.default_rng(seed)
    found = draw.integers(ends.min, ends.max + 1, shape).astype(BYTES[kind])
    found.flat[:2] = ends.min, ends.max
    return found


def text(kind: str, limbs: int, count: int) -> str:
    """Return a program that multiplies so many words of each row.

    It writes of each lane `m0` to `m3`, `n0` and `n2` if they are there, and TIMES what
    all limbs' products of both rows are.
    """
    held = matrix_units.held(limbs)
    program = f"""{{
    .reg .pred first;
    .reg .b32 thread, lane, warp, a, b, times, w<{2 * count}>, x<{len(held) * count}>;
    .reg .b64 address, base;
    .reg .f32 f, g;"""
    program += matrix_units.declare(limbs) + begin()
    program += matrix_units.find_place(limbs) + matrix_units.clear(limbs, count)
    program += f"""
    mad.lo.u32 a, own_line, {PARTS}, own_part;
    mov.b64 base, %words;
    mad.wide.u32 address, a, {4 * count}, base;"""
    for row, word in itertools.product(range(2), range(0, count, 4)):
        own, place = registers("w", row * count + word, 4), row * LINES * PARTS * count
        program += f"\n    ld.global.v4.b32 {own}, [address+{4 * (place + word)}];"
    program += f"""
    mad.lo.u32 a, own_limb, {PARTS}, own_part;
    mov.b64 base, %x;
    mad.wide.u32 address, a, {4 * count}, base;"""
    for (i, (holds, limb)), word in itertools.product(
        enumerate(held), range(0, count, 4)
    ):
        own, place = registers("x", i * count + word, 4), limb * PARTS * count
        place = 4 * (place + word)
        program += f"\n    @{holds} ld.global.v4.b32 {own}, [address+{place}];"
    starts = [i * count for i in range(len(held))]
    program += matrix_units.multiply(kind, count, (0, count), starts)
    program += f"""
    mov.u32 times, {TIMES};
    mov.b64 base, %products;
    mad.wide.u32 address, lane, 32, base;
    st.global.v4.b32 [address], {registers("m", 0, 4)};"""
    for row in range(2) if limbs == 3 else ():
        program += f"\n    st.global.b32 [address+{16 + 4 * row}], n{2 * row};"
    for row in range(2):
        program += matrix_units.to_float(limbs, row)
        program += f"\n    st.global.f32 [address+{24 + 4 * row}], f;"
    return bind(program + "\n}", ("words", "x", "products", "shared"))


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("limbs", [2, 3])
@pytest.mark.parametrize("count", [4, 8])
def test_a_lane_is_left_with_the_products_of_its_words(kind, limbs, count):
    """Seen red with two registers of a tile exchanged, of rows or of halves.

    And with activations not cleared, another part's, and limbs the other way round.
    """
    words = drawn(0, kind, 2 * LINES, PARTS, 4 * count)
    x = drawn(1, "s8", limbs, PARTS, 4 * count)
    products = np.zeros((LANES, 8), np.int32)
    Machine(text(kind, limbs, count), [words, x, products], 0, 1).run(1)
    sums = np.einsum("rpi,lpi->lrp", words, x, dtype=np.int64)
    # A lane's rows, of all lanes in their order.
    of_lanes = sums.reshape(limbs, 2, LANES)
    for row, (high, low) in enumerate(of_lanes[:2].swapaxes(0, 1)):
        same(products[:, 2 * row], high)
        same(products[:, 2 * row + 1], low)
    same(products[:, 4:6].T, of_lanes[2] if limbs == 3 else 0)
    whole = np.float32((256 * of_lanes[0] + of_lanes[1]) * TIMES)
    if limbs == 3:
        # Of the numbers only two floats are rounded, and their sum.
        third = np.float32(of_lanes[2] * TIMES)
        whole = np.float32(256 * np.float64(whole) + third)
    same(products[:, 6:].view(np.float32).T, whole)


@pytest.mark.parametrize("kind", BYTES)
def test_the_machine_multiplies_bytes_as_the_manual_says(kind):
    """PTX ISA, "Matrix Fragments for mma.m16n8k32": where byte i of a lane is.

    Seen red with rows, halves of columns, or bytes of a word exchanged, in each tile.
    """
    first, second = drawn(0, kind, 16, 32), drawn(1, "s8", 32, 8)
    added = np.random.default_rng(2).integers(-(2**20), 2**20, (16, 8), np.int32)
    a, b = np.zeros((LANES, 16), first.dtype), np.zeros((LANES, 8), np.int8)
    c, wanted = np.zeros((2, LANES, 4), np.int32)
    whole = first.astype(np.int32) @ second + added
    for lane in range(LANES):
        group, thread = lane >> 2, lane % 4
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            column = 4 * thread + i % 4 + 16 * (i >= 8)
            a[lane, i] = first[row, column]
        for i in range(8):
            b[lane, i] = second[4 * thread + i % 4 + 16 * (i >= 4), group]
        for i in range(4):
            place = group if i < 2 else group + 8, 2 * thread + i % 2
            c[lane, i], wanted[lane, i] = added[place], whole[place]
    of_words = lambda lanes: list(np.ascontiguousarray(lanes.view(np.uint32).T))  # noqa: E731
    multiply = MULTIPLY[f"m16n8k32.row.col.s32.{kind}.s8.s32"]
    found = multiply(*map(of_words, (a, b, c)))
    same(np.stack(found, 1).view(np.int32), wanted)
