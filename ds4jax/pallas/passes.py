"""What is known while a pass is traced: its kind, and who looks at its products.

Neither changes what is computed, only how: so neither is an argument of every module.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
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


@struct.dataclass
@no_type_check
class DecodePass:
    """What is known of a decode pass while it is traced; its operands are [1, T, ...].

    Attributes:
      width: how many of its rows, the first ones, are not copies.
      own: of those, how many have to be computed: a value, of which no shape depends.
    """

    width: int = struct.field(pytree_node=False)
    own: Int[Array, ""]


@struct.dataclass
class Prefill:
    """A longer pass over a cache, which nobody takes a derivative of."""


Pass = DecodePass | Prefill | None
_pass: contextvars.ContextVar[Pass] = contextvars.ContextVar("pass", default=None)


@contextlib.contextmanager
def within(kind: Pass) -> Iterator[None]:
    """Say of what pass the products are that are traced in the block.

    The rows that fill a decode pass up are then not multiplied, and their results are
    copies of the last row's.  None is a pass without a cache.
    """
    token = _pass.set(kind)
    try:
        yield
    finally:
        _pass.reset(token)


def has_kernels() -> bool:
    """Say whether this is a decode pass, parts of which kernels may compute."""
    return _decode_pass() is not None


def _decode_pass() -> DecodePass | None:
    kind = _pass.get()
    return None if is_watched() or not isinstance(kind, DecodePass) else kind


def is_prefill() -> bool:
    """Say whether this is a long pass over a cache."""
    return isinstance(_pass.get(), Prefill)


def traced_once(run: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Return `run(*args)`; what is called so again with such operands is known by then.

    The layers of a model are few kinds of layer, and to trace and lower one takes
    longer than to compile it.  XLA puts the calls back in place first of all.  Who
    watches the products would miss those of the second call.

    Args:
      run: a function of a module, which holds nothing that is being traced.
      args: all that it computes from, but for the kind of pass.
    """
    return _run_within(run, _pass.get(), *args)


@functools.partial(jax.jit, static_argnums=0)
def _run_within(run, kind, *args):
    with within(kind):
        return run(*args)


def by_rows(
    product: Callable[..., PyTree],
    *rows: Array,
    cuda: Callable[..., PyTree] | None = None,
) -> PyTree:
    """Return `product(*rows)`, arrays [1, T, ...]; of a decode pass, the fastest way.

    A CPU has to compute each row, and the first brings a weight into its cache for the
    next: it takes those that anyone looks at, one after the other, and a row's result
    is that of one row alone whatever their number is.  A GPU would wait for the host
    at each turn of that loop.

    Args:
      product: of rows.
      rows: its operands.
      cuda: as of `by_kernel`.
    """
    decode_pass = _decode_pass()
    if decode_pass is None:
        return product(*rows)
    shapes = jax.eval_shape(product, *rows)

    def one_by_one(*rows):
        def add_row(index, total):
            row = (jax.lax.dynamic_slice_in_dim(a, index, 1, 1) for a in rows)
            put = lambda all, one: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
                all, one, index, 1
            )
            return jax.tree.map(put, total, product(*row))

        own = decode_pass.own
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total = jax.lax.fori_loop(0, own, add_row, zeros)
        copied = jnp.minimum(jnp.arange(rows[0].shape[1]), own - 1)
        return jax.tree.map(lambda array: array[:, copied], total)

    return by_kernel(product, *rows, cuda=cuda, cpu=one_by_one)


def by_kernel(
    product: Callable[..., PyTree],
    *rows: PyTree,
    cuda: Callable[..., PyTree] | None,
    cpu: Callable[..., PyTree] | None = None,
) -> PyTree:
    """Return `product(*rows)`, arrays [1, T, ...]; of a decode pass, as a device can.

    Args:
      product: of rows.
      rows: its operands, arrays or trees of them.
      cuda: what NVIDIA GPUs do instead, given `DecodePass.width` first.  It may compute
        as many rows as that and has to return them all: what surrounds it is then the
        same program at every width, and fused alike.
      cpu: what CPUs do instead.
    """
    decode_pass = _decode_pass()
    if decode_pass is None:
        return product(*rows)

    special = {"cpu": cpu, "cuda": cuda and functools.partial(cuda, decode_pass.width)}
    special = {platform: run for platform, run in special.items() if run}
    if not special:
        return product(*rows)
    return jax.lax.platform_dependent(*rows, **special, default=product)


def of_prefill(
    product: Callable[..., PyTree], *rows: Array, cuda: Callable[..., PyTree] | None
) -> PyTree:
    """Return `product(*rows)`; of a long pass over a cache, NVIDIA GPUs do `cuda`.

    No other pass has it as a branch: kernels have no derivatives, and JAX takes those
    of all branches, whatever the platform.
    """
    if cuda is None or not is_prefill() or is_watched():
        return product(*rows)
    return jax.lax.platform_dependent(*rows, cuda=cuda, default=product)
