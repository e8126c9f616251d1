"""The ways a module multiplies by a weight, quantised or float.

Every op takes weights as `[out, in]` (ggml's own order), multiplies operands of type
`dtype` and accumulates in float32.  The implementation here is XLA's: dequantise, then
dot.  It serves every device, and is the reference for any kernel.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.quant import QuantTensor, dequantize

Weight = QuantTensor | Array | np.ndarray

_EXPERTS_AT_ONCE = 16
"""Experts dequantised together, see `experts_in_groups`: bounds its memory at any E."""

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


def _tell(x: Array, w: Weight, expert_ids: Array | None = None):
    if report := _report.get():
        report(x, w, expert_ids)


_own_rows: contextvars.ContextVar[Int[Array, ""] | None] = contextvars.ContextVar(
    "own_rows", default=None
)


@contextlib.contextmanager
def row_by_row(own: Int[Array, ""] | None) -> Iterator[None]:
    """Let a CPU multiply the rows of a decode pass one at a time, and no copies.

    A CPU has to compute each row, and the first brings the weight into its cache for
    the next.  A row's product is that of one row alone whatever `own` is.

    Args:
      own: `Rows.own` of the pass that is traced in the block, whose operands are
        [1, T, ...]; the results of later rows are copies of the last of these.  None
        for a pass of another kind.
    """
    token = _own_rows.set(own)
    try:
        yield
    finally:
        _own_rows.reset(token)


def by_rows(product: Callable[..., Array], *rows: Array) -> Array:
    """Return `product(*rows)`, [1, T, ...], as `row_by_row` says."""
    own = _own_rows.get()
    if own is None or is_watched():
        return product(*rows)
    shape = jax.eval_shape(product, *rows)

    def one_by_one(own, *rows):
        def add_row(index, total):
            row = (jax.lax.dynamic_slice_in_dim(a, index, 1, 1) for a in rows)
            return jax.lax.dynamic_update_slice_in_dim(total, product(*row), index, 1)

        total = jax.lax.fori_loop(0, own, add_row, jnp.zeros(shape.shape, shape.dtype))
        return total[:, jnp.minimum(jnp.arange(shape.shape[1]), own - 1)]

    # Not on a GPU, where each turn of a loop waits for the host.
    return jax.lax.platform_dependent(
        own, *rows, cpu=one_by_one, default=lambda own, *rows: product(*rows)
    )


def _precision(dtype: str) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def einsum(spec: str, x: Array, w: Array, dtype: str) -> Array:
    """Return `jnp.einsum(spec, x, w)` in float32, the operands rounded to `dtype`.

    The gradient's products have operands of `dtype` too.
    """
    return _einsum(spec, x, w, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(spec: str, x: Array, w: Array, dtype: str) -> Array:
    return jnp.einsum(
        spec,
        x.astype(dtype),
        w.astype(dtype),
        preferred_element_type=jnp.float32,
        precision=_precision(dtype),
    )


def _einsum_forward(spec, x, w, dtype):
    return _einsum(spec, x, w, dtype), (x, w)


def _einsum_backward(spec, dtype, operands, cotangent):
    precision = _precision(dtype)
    product = lambda x, w: jnp.einsum(spec, x, w, precision=precision)  # noqa: E731
    rounded = (operand.astype(dtype) for operand in operands)
    _, pull_back = jax.vjp(product, *rounded)
    found = pull_back(cotangent.astype(dtype))
    return tuple(f.astype(o.dtype) for f, o in zip(found, operands, strict=True))


_einsum.defvjp(_einsum_forward, _einsum_backward)


def quant_matmul(
    x: Float[Array, "*rows In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "*rows Out"]:
    """Return `x @ w.T` in float32, for `w [Out, In]`."""
    _tell(x, w)
    values = dequantize(w)
    return by_rows(lambda x: einsum("...i,oi->...o", x, values, dtype), x)


def grouped_matmul(
    x: Float[Array, "*rows G In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "*rows G Out"]:
    """Return `x[..., g, :] @ w[g].T` in float32, for `w [G * Out, In]` by groups.

    Rows `g * Out ...` of the stored matrix belong to group g, as ds4 stores the
    grouped output projection.
    """
    _tell(x, w)
    groups, width = x.shape[-2:]
    values = dequantize(w).reshape(groups, -1, width)
    return by_rows(lambda x: einsum("...gi,goi->...go", x, values, dtype), x)


def expert_matmul(
    x: Float[Array, "N U In"],
    w: Weight,
    expert_ids: Int[Array, "N U"],
    dtype: str = "float32",
) -> Float[Array, "N U Out"]:
    """Return `x[n, u] @ w[expert_ids[n, u]].T`, for `w [E, Out, In]`.

    Only the chosen experts are read and dequantised.
    """
    _tell(x, w, expert_ids)
    chosen = jax.tree.map(lambda plane: plane[expert_ids], w)
    return einsum("nui,nuoi->nuo", x, dequantize(chosen), dtype)


def experts_in_groups(w: Weight, experts: int) -> tuple[Weight, int]:
    """Reshape the planes of `w [E, ...]` to `[groups, E / groups, ...]`.

    Returns the reshaped weight and the number of groups, the smallest that divides E
    and keeps at most 16 experts dequantised at a time.
    """
    groups = next(
        g
        for g in range(1, experts + 1)
        if experts % g == 0 and experts // g <= _EXPERTS_AT_ONCE
    )
    split = lambda plane: plane.reshape(groups, experts // groups, *plane.shape[1:])  # noqa: E731
    return jax.tree.map(split, w), groups


def every_expert_matmul(
    x: Float[Array, "*experts N In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "E N Out"]:
    """Return `x @ w[e].T` for every expert of `w [E, Out, In]`.

    `x` is `[N, In]`, shared by the experts, or `[E, N, In]`.
    """
    spec = "ni,eoi->eno" if x.ndim == 2 else "eni,eoi->eno"
    return einsum(spec, x, dequantize(w), dtype)
