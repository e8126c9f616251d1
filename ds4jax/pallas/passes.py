"""What is known while a pass is traced: its kind, and who looks at its products.

Neither changes what is computed, only how: so neither is an argument of every module.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ds4jax.quant import QuantTensor

Weight = QuantTensor | Array | np.ndarray
Report = Callable[[Array, Weight, Array | None], None]
"""Told of a product: x [..., In], the weight, and the expert ids of `expert_matmul`."""

_report: contextvars.ContextVar[Report | None] = contextvars.ContextVar(
    "report", default=None
)


@contextlib.contextmanager
def watching(report: Report) -> Iterator[None]:
    """Call `report` with the operands of every product that is traced in the block.

    Products are reported as their code is traced: a function that jit knows already
    reports nothing, and what it was compiled to outside the block has no trace of
    this.  `every_expert_matmul` cannot say which rows are an expert's and is silent;
    `MoE` does without it here.
    """
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


def is_watched() -> bool:
    """Say whether this is a block of `watching`."""
    return _report.get() is not None


def tell(x: Array, w: Weight, expert_ids: Array | None = None):
    """Report a product to who watches."""
    if report := _report.get():
        report(x, w, expert_ids)


@dataclasses.dataclass(frozen=True)
class DecodePass:
    """What is known of a decode pass while it is traced; its operands are [1, T, ...].

    Attributes:
      width: how many of its rows, the first ones, are not copies.
      own: of those, how many have to be computed: a value, of which no shape depends.
    """

    width: int
    own: Int[Array, ""]


_decode_pass: contextvars.ContextVar[DecodePass | None] = contextvars.ContextVar(
    "decode_pass", default=None
)


@contextlib.contextmanager
def within(decode_pass: DecodePass | None) -> Iterator[None]:
    """Say of what pass the products are that are traced in the block.

    The rows that fill a decode pass up are then not multiplied, and their results are
    copies of the last row's.  None is a pass of another kind.
    """
    token = _decode_pass.set(decode_pass)
    try:
        yield
    finally:
        _decode_pass.reset(token)


def by_rows(
    product: Callable[..., Array],
    *rows: Array,
    cuda: Callable[..., Array] | None = None,
) -> Array:
    """Return `product(*rows)`, [1, T, ...]; of a decode pass, the fastest way.

    A CPU has to compute each row, and the first brings a weight into its cache for the
    next: it takes those that anyone looks at, one after the other, and a row's result
    is that of one row alone whatever their number is.  A GPU would wait for the host
    at each turn of that loop.

    Args:
      product: of rows.
      rows: its operands.
      cuda: as of `by_kernel`.
    """
    decode_pass = _decode_pass.get()
    if decode_pass is None or is_watched():
        return product(*rows)
    shape = jax.eval_shape(product, *rows)

    def one_by_one(*rows):
        def add_row(index, total):
            row = (jax.lax.dynamic_slice_in_dim(a, index, 1, 1) for a in rows)
            return jax.lax.dynamic_update_slice_in_dim(total, product(*row), index, 1)

        own, zero = decode_pass.own, jnp.zeros(shape.shape, shape.dtype)
        total = jax.lax.fori_loop(0, own, add_row, zero)
        return total[:, jnp.minimum(jnp.arange(total.shape[1]), own - 1)]

    return by_kernel(product, *rows, cuda=cuda, cpu=one_by_one)


def by_kernel(
    product: Callable[..., PyTree],
    *rows: Array,
    cuda: Callable[..., PyTree] | None,
    cpu: Callable[..., PyTree] | None = None,
) -> PyTree:
    """Return `product(*rows)`, arrays [1, T, ...]; of a decode pass, as a device can.

    Args:
      product: of rows.
      rows: its operands.
      cuda: what NVIDIA GPUs do instead, given `DecodePass.width` first.  It may compute
        as many rows as that and has to return them all: what surrounds it is then the
        same program at every width, and fused alike.
      cpu: what CPUs do instead.
    """
    decode_pass = _decode_pass.get()
    if decode_pass is None or is_watched():
        return product(*rows)

    special = {"cpu": cpu, "cuda": cuda and functools.partial(cuda, decode_pass.width)}
    special = {platform: run for platform, run in special.items() if run}
    if not special:
        return product(*rows)
    return jax.lax.platform_dependent(*rows, **special, default=product)
