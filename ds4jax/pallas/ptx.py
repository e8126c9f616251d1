"""Programs in PTX: phrases of their text, and how Mosaic GPU carries them.

Every product and sum of floats says how it is rounded, `.rn`: what does not, ptxas may
make one `fma` of, in the program for one row and not in that for two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.utils import memref_ptr
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array

LANES = 32
"""Of a warp."""

BITS = 16, 8, 4, 2, 1
"""Of a lane's number: values that lanes exchange by each in turn all of them have."""

SHARED = 226 * 1024
"""Bytes of shared memory that a program can have on Hopper, if Mosaic GPU carries it.

Of the 227 KB that there are, one launches no longer with more than this.
"""


class Piece(NamedTuple):
    """What the copy engine brings by one instruction.

    Attributes:
      operand: of which it is a part.
      index: register of the number of its first item.
      item: bytes of an item.
      nbytes: of the piece.
      gap: bytes that are left out after it.
    """

    operand: str
    index: str
    item: int
    nbytes: int
    gap: int = 0


class Place(NamedTuple):
    """Where a launch has room for what programs share.

    Attributes:
      shared: bytes after the beginning of shared memory.
      counters: bytes after the beginning of the operand `counters`.
      barrier: number of a named barrier.
    """

    shared: int
    counters: int
    barrier: int

    def meet(self, warps: int) -> str:
        """Have so many warps meet."""
        return f"\n    bar.sync {self.barrier}, {warps * LANES};"


def programs() -> int:
    """Return how many programs can run side by side, each on a multiprocessor.

    0 if the device is not for programs in PTX: they want an NVIDIA GPU from Hopper on.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return 0
    return device.core_count if float(device.compute_capability) >= 9 else 0


def launch(
    name: str,
    text: str,
    operands: Sequence[Array],
    out_type: Sequence[jax.ShapeDtypeStruct],
    shared: int,
    programs: int,
    warps: int,
) -> Sequence[Array]:
    """Return what programs write.

    Args:
      name: of the kernel.
      text: of a program, `$i` for the address of operand i: first those given, then
        those written, then shared memory.
      operands: that it reads.  Counters among them, by which programs wait for each
        other, are changed meanwhile, so nothing that reads them may run beside it.
      out_type: what it writes.
      shared: bytes of shared memory.
      programs: that run side by side.
      warps: of a program, a multiple of four.
    """

    def kernel(*refs):
        types = (plgpu.RefType(),) * len(refs)
        plgpu.inline_mgpu(arg_types=types)(_carry(text))(*refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[plgpu.SMEM((shared,), jnp.int8)],
        grid=(programs,),
        grid_names=("program",),
        num_threads=warps // 4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands)


def _carry(text: str):
    """Return what puts a program into a kernel, given references of its operands."""

    def carry(_, *refs):
        i64 = ir.IntegerType.get_signless(64)
        addresses = [llvm.ptrtoint(i64, memref_ptr(ref)) for ref in refs]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            addresses,
            text,
            ",".join(["l"] * len(addresses) + ["~{memory}"]),
            has_side_effects=True,
        )

    return carry


def begin() -> str:
    """Find a thread's number, lane and warp, and whether it is a warp's first lane."""
    return f"""
    mov.u32 thread, %tid.x;
    mov.u32 a, %tid.y;
    mov.u32 b, %ntid.x;
    mad.lo.u32 thread, a, b, thread;
    and.b32 lane, thread, {LANES - 1};
    shr.u32 warp, thread, {LANES.bit_length() - 1};
    setp.eq.u32 first, lane, 0;"""


def bind(text: str, operands: Sequence[str]) -> str:
    """Put numbers in the place of operands' names: `%name` becomes its `$i`."""
    for i, name in enumerate(operands):
        text = text.replace(f"%{name};", f"${i};")
    return text


def start_barriers(barriers: Sequence[tuple[int, int]]) -> str:
    """Have the first lane set barriers up: where they are, and how many each waits for.

    The copy engine is told of them too.
    """
    text = "".join(
        f"\n    @first mbarrier.init.shared::cta.b64 [shared+{at}], {count};"
        for at, count in barriers
    )
    return text + "\n    @first fence.proxy.async.shared::cta;"


def arrive(barrier: int) -> str:
    """Say that a warp is done, at a barrier so far from `bar`."""
    return f"""
    bar.warp.sync 0xffffffff;
    @first mbarrier.arrive.shared::cta.b64 _, [bar+{barrier}];"""


def copy(to: str, pieces: Sequence[Piece]) -> str:
    """Have the first lane copy pieces one after the other, for the phase of `bar`.

    Args:
      to: register of the place in shared memory, which is moved on.
      pieces: in their order there.
    """
    start = "@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    size = sum(piece.nbytes for piece in pieces)
    text = f"""
    @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {size};"""
    for piece in pieces:
        text += f"""
    mov.b64 base, %{piece.operand};
    mad.wide.u32 address, {piece.index}, {piece.item}, base;
    {start} [{to}], [address], {piece.nbytes}, [bar];
    add.u32 {to}, {to}, {piece.nbytes + piece.gap};"""
    return text


def store_row(
    value: str, guard: str, row: str, rows: int, copied: int, nbytes: int
) -> str:
    """Write lanes' values of a row at `address`, and of the last row copies after it.

    Args:
      value: register of a value.
      guard: predicate of lanes that have one, which is changed.
      row: register of its number.
      rows: how many there are.
      copied: how many copies.
      nbytes: of a row.
    """
    return f"\n    @{guard} st.global.f32 [address], {value};" + store_copies(
        value, guard, row, rows, copied, nbytes, "address"
    )


def store_copies(
    value: str, guard: str, row: str, rows: int, copied: int, nbytes: int, at: str
) -> str:
    """Write the copies of `store_row` alone, for a row that is at `at`."""
    if not copied:
        return ""
    text = f"\n    setp.eq.and.u32 {guard}, {row}, {rows - 1}, {guard};"
    for i in range(1, copied + 1):
        text += f"\n    @{guard} st.global.f32 [{at}+{i * nbytes}], {value};"
    return text


def wait(label: str, barrier: str, phase: str) -> str:
    """Wait until a barrier, whose address is in a register, has ended a phase."""
    return f"""
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 p, [{barrier}], {phase};
    @!p bra {label};"""


def add_lanes(value: str, other: str, bit: int) -> str:
    """Add to a lane's value that of the lane whose number differs in a bit."""
    return f"""
    shfl.sync.bfly.b32 {other}, {value}, {bit}, 31, 0xffffffff;
    add.rn.f32 {value}, {value}, {other};"""


def add_product(to: str, value: str, times: str, is_first: bool) -> str:
    """Add a product to a sum, which the first one is itself."""
    if is_first:
        return f"\n    mul.rn.f32 {to}, {value}, {times};"
    return f"\n    fma.rn.f32 {to}, {value}, {times}, {to};"


def exponential(to: str, value: str, sign: int = 1) -> str:
    """Leave e to the power of a value, or of its negative."""
    return f"""
    mul.rn.f32 {to}, {value}, {number(sign * np.log2(np.e))};
    ex2.approx.f32 {to}, {to};"""


def add_shared(to: str, other: str, at: str, place: int, count: int, apart: int) -> str:
    """Add up numbers in shared memory, in their order.

    Args:
      to: register of the sum.
      other: register that is used.
      at: register of an address.
      place: of the first number after it.
      count: of numbers.
      apart: bytes from one to the next.
    """
    text = f"\n    ld.shared.f32 {to}, [{at}+{place}];"
    for i in range(1, count):
        text += f"""
    ld.shared.f32 {other}, [{at}+{place + i * apart}];
    add.rn.f32 {to}, {to}, {other};"""
    return text


def add_up(rows: int, lanes: int = LANES) -> str:
    """Add up sums of rows, of lanes that follow each other, both powers of two.

    Of as many rows as lanes or less a lane is left with one, `sum0`: that of row i is
    with the i-th of as many parts of these lanes.  Of more each is left with as many
    that follow each other.
    """
    text, live, bit = "", list(range(rows)), lanes // 2
    while len(live) > 1 and bit:
        half = len(live) // 2
        text += f"""
    and.b32 a, lane, {bit};
    setp.ne.u32 p, a, 0;"""
        for low, high in zip(live[:half], live[half:], strict=True):
            text += f"""
    selp.f32 f, sum{low}, sum{high}, p;
    selp.f32 sum{low}, sum{high}, sum{low}, p;
    shfl.sync.bfly.b32 f, f, {bit}, 31, 0xffffffff;
    add.rn.f32 sum{low}, sum{low}, f;"""
        live, bit = live[:half], bit // 2
    while bit:
        text += add_lanes("sum0", "f", bit)
        bit //= 2
    return text


def divide(to: str, value: str, by: int) -> str:
    """Divide a number without a sign; ptxas makes no shift of a division itself."""
    if by & by - 1:
        return f"\n    div.u32 {to}, {value}, {by};"
    return f"\n    shr.u32 {to}, {value}, {by.bit_length() - 1};"


def registers(name: str, first: int, count: int) -> str:
    """Return registers that are loaded together."""
    return f"{{{', '.join(f'{name}{first + i}' for i in range(count))}}}"


def number(value: float) -> str:
    """Return a number as PTX has it: the bits of a float32."""
    return f"0f{np.float32(value).view(np.uint32):08X}"
