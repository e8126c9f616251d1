"""Lowering for NVIDIA's Hopper, and other platforms, on a machine that has none."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def lowered(function: Callable, *args: object, platform: str = "cuda") -> str:
    """Return what `function` is lowered to: kernels are compiled as far as Triton's IR.

    Args:
      function: to be jitted.
      args: arrays, or their shapes.
      platform: what for.
    """
    # jax 0.12 asks for the device that Triton is to be lowered for.
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()
