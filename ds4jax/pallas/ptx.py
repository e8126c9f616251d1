"""Programs in PTX: phrases of their text, and how Mosaic GPU carries them."""

from __future__ import annotations

from collections.abc import Sequence

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

SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on Hopper."""


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
) -> list[Array]:
    """Return what programs write.

    Args:
      name: of the kernel.
      text: of a program, `$i` for the address of operand i: first those given, then
        those written, then shared memory.
      operands: that it reads.
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
    add.f32 {value}, {value}, {other};"""


def registers(name: str, first: int, count: int) -> str:
    """Return registers that are loaded together."""
    return f"{{{', '.join(f'{name}{first + i}' for i in range(count))}}}"


def number(value: float) -> str:
    """Return a number as PTX has it: the bits of a float32."""
    return f"0f{np.float32(value).view(np.uint32):08X}"
