"""The ways a module multiplies by a weight, quantised or float.

Every op takes weights as `[out, in]` (ggml's own order), multiplies operands of type
`dtype` and accumulates in float32.  The implementation here is XLA's: dequantise, then
dot.  It serves every device, and is the reference for any kernel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.quant import QuantTensor, dequantize

Weight = QuantTensor | Array | np.ndarray

_EXPERTS_AT_ONCE = 16
"""Experts dequantised together, see `experts_in_groups`: bounds its memory at any E."""


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
    return einsum("...i,oi->...o", x, dequantize(w), dtype)


def grouped_matmul(
    x: Float[Array, "*rows G In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "*rows G Out"]:
    """Return `x[..., g, :] @ w[g].T` in float32, for `w [G * Out, In]` by groups.

    Rows `g * Out ...` of the stored matrix belong to group g, as ds4 stores the
    grouped output projection.
    """
    groups, width = x.shape[-2:]
    w = dequantize(w).reshape(groups, -1, width)
    return einsum("...gi,goi->...go", x, w, dtype)


def expert_matmul(
    x: Float[Array, "N U In"],
    w: Weight,
    expert_ids: Int[Array, "N U"],
    dtype: str = "float32",
) -> Float[Array, "N U Out"]:
    """Return `x[n, u] @ w[expert_ids[n, u]].T`, for `w [E, Out, In]`.

    Only the chosen experts are read and dequantised.
    """
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
