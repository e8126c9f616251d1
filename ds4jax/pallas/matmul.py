"""The ways a module multiplies by a weight, quantised or float.

Every op takes weights as `[out, in]` (ggml's own order), multiplies operands of type
`dtype` and accumulates in float32.  The implementation here is XLA's: dequantise, then
dot.  It serves every device, and is the reference for the kernels, which serve the
decode passes of NVIDIA GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ds4jax.pallas import plain, q8_0, two_maps
from ds4jax.pallas.fixed_point import FixedPoint, fix
from ds4jax.pallas.passes import Weight, by_rows, tell
from ds4jax.quant import QuantTensor, dequantize

_EXPERTS_AT_ONCE = 16
"""Experts dequantised together, see `experts_in_groups`: bounds its memory at any E."""


def is_q8_0(w: object) -> TypeGuard[QuantTensor]:
    """Say whether a weight is one that `q8_0` multiplies."""
    return isinstance(w, QuantTensor) and w.format == "Q8_0"


def _precision(dtype: str) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None


def einsum(spec: str, x: Array, w: Array, dtype: str) -> Array:
    """Return `jnp.einsum(spec, x, w)` in float32, the operands rounded to `dtype`.

    The gradient's products have operands of `dtype` too.
    """
    return _once(spec, x, w, dtype)


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
_once = jax.jit(_einsum, static_argnums=(0, 3), inline=True)


def quant_matmul(
    x: Float[Array, "*rows In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "*rows Out"]:
    """Return `x @ w.T` in float32, for `w [Out, In]`."""
    (out,) = quant_matmuls(x, [w], dtype)
    return out


def quant_matmuls(
    x: Float[Array, "*rows In"],
    weights: Sequence[Weight],
    dtype: str = "float32",
    fixed: FixedPoint | None = None,
) -> tuple[Float[Array, "*rows _"], ...]:
    """Return `quant_matmul(x, w, dtype)` for each of some weights.

    A GPU's kernels take them all in one launch, if they are of one format.

    Args:
      x: the rows.
      weights: [Out, In], each with an Out of its own.
      dtype: operand type.
      fixed: `fix(x, dtype)`, if it is there already, for the kernels that read that.
    """
    for w in weights:
        tell(x, w)
    values = [dequantize(w) for w in weights]
    product = lambda x: tuple(einsum("...i,oi->...o", x, v, dtype) for v in values)  # noqa: E731
    return by_rows(product, x, cuda=_dense_kernel(weights, dtype, fixed))


def normed_kernel(
    norm: tuple[Float[Array, "In"], float], w: Weight, dtype: str
) -> Callable[[int, Array], Array] | None:
    """Return the kernel of `by_kernel` for a product of normed rows, if there is one.

    Args:
      norm: weight and epsilon of the RMS norm.
      w: [Out, In].
      dtype: operand type.
    """
    if not is_q8_0(w):
        return None

    def kernel(width: int, x: Array) -> Array:
        return q8_0.matvec(fix(x[0], dtype, norm=norm), w, width=width)[None, :, 0]

    return kernel


def _dense_kernel(
    weights: Sequence[Weight], dtype: str, fixed: FixedPoint | None
) -> Callable[[int, Array], tuple[Array, ...]] | None:
    """Return the kernel of `by_kernel` for weights of one format, if there is one."""
    packed = [w for w in weights if is_q8_0(w)]
    # A float32 weight would have to be rounded to another operand type.
    served = ["float16", "float32"] if dtype == "float32" else ["float16"]
    floats = [
        w for w in weights if not isinstance(w, QuantTensor) and w.dtype in served
    ]
    if len(packed) == len(weights):

        def multiply(x, width):
            rows = fix(x, dtype) if fixed is None else fixed
            return q8_0.matvecs(rows, packed, width)

    elif len(floats) == len(weights):

        def multiply(x, width):
            return plain.matvecs(x, floats, width, dtype=dtype)

    else:
        return None

    def kernel(width, x):
        if x.ndim == 3:
            return tuple(out[None] for out in multiply(x[0], width))
        # Several vectors a row: the sums of 8 at most fit into registers.
        vectors = x[0, :width].reshape(-1, x.shape[-1])
        parts = (vectors[i : i + 8] for i in range(0, len(vectors), 8))
        found = zip(*(multiply(part, len(part)) for part in parts), strict=True)
        shape = 1, width, *x.shape[2:-1], -1
        copied = jnp.minimum(jnp.arange(x.shape[1]), width - 1)
        return tuple(jnp.concatenate(out).reshape(shape)[:, copied] for out in found)

    return kernel


def grouped_matmul(
    x: Float[Array, "*rows G In"], w: Weight, dtype: str = "float32"
) -> Float[Array, "*rows G Out"]:
    """Return `x[..., g, :] @ w[g].T` in float32, for `w [G * Out, In]` by groups.

    Rows `g * Out ...` of the stored matrix belong to group g, as ds4 stores the
    grouped output projection.
    """
    tell(x, w)
    groups, width = x.shape[-2:]
    values = dequantize(w).reshape(groups, -1, width)
    product = lambda x: einsum("...gi,goi->...go", x, values, dtype)  # noqa: E731

    def kernel(rows, x):
        assert is_q8_0(w)
        return q8_0.matvec(fix(x.reshape(-1, width), dtype), w, groups, rows)[None]

    return by_rows(product, x, cuda=kernel if is_q8_0(w) else None)


def two_maps_kernel(
    first: Weight,
    second: Weight,
    groups: int,
    dtype: str,
    *,
    interpret: bool = False,
) -> Callable[[int, FixedPoint], Array] | None:
    """Return what multiplies rows by two weights, the first by groups, if it can.

    It is given how many of R rows, the first ones, are not copies, and R * groups rows
    of In, the groups of a row one after the other, and returns [1, R, Out].

    Args:
      first: [groups * Mid, In].
      second: [Out, groups * Mid].
      groups: how many.
      dtype: operand type.
      interpret: without a GPU.
    """
    if not (is_q8_0(first) and is_q8_0(second)):
        return None
    if not q8_0.serves_fixed(first, groups):
        return None

    programs = 0 if interpret else two_maps.programs(first, second, groups, dtype)

    def kernel(width: int, x: FixedPoint) -> Array:
        if programs:
            return two_maps.multiply(x, first, second, groups, dtype, width, programs)[
                None
            ]
        middle = q8_0.matvec_fixed(x, first, groups, dtype, width, interpret=interpret)
        out = q8_0.matvec(middle, second, width=width, interpret=interpret)
        return out[None, :, 0]

    return kernel


def expert_matmul(
    x: Float[Array, "N #U In"],
    w: Weight,
    expert_ids: Int[Array, "N U"],
    dtype: str = "float32",
) -> Float[Array, "N U Out"]:
    """Return `x[n, u] @ w[expert_ids[n, u]].T`, for `w [E, Out, In]`.

    Only the chosen experts are read and dequantised.

    Args:
      x: rows, one for all their experts or one for each.
      w: the experts.
      expert_ids: of each row.
      dtype: operand type.
    """
    x = jnp.broadcast_to(x, (*expert_ids.shape, x.shape[-1]))
    tell(x, w, expert_ids)
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
