"""ds4's simulated KV rounding: FP8 and F16 on cache rows, Hadamard + FP4 on the index.

Always on in ds4, absent from the Hugging Face reference (ARCHITECTURE §9); here it is
`ModelConfig.kv_rounding`.  All of it is elementwise or a fixed butterfly, so a row's
bits never depend on other rows.

Where it is not ds4's bit for bit: -0 keeps its sign, XLA on the CPU flushes subnormal
float32 (below 2^-126), and a scale just above a power of two is exact here, where ds4's
`ceilf(log2f(x))` may round it down.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_FP8_BLOCK = 64
_FP8_MAX = 448.0
_FP8_FLOOR = np.float32(1e-4)
_FP4_BLOCK = 32
_FP4_MAX = 6.0
_FP4_FLOOR = np.float32(6.0 * 2.0**-126)


def _power_of_two_above(x: Array) -> Array:
    """Return `2 ** ceil(log2(x))` exactly, for positive normal float32 `x`."""
    mantissa, exponent = jnp.frexp(x)
    exponent = exponent - (mantissa == 0.5)
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _blocks(x: Array, size: int) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def fp8_round_trip(x: Float[Array, "*rows N"]) -> Float[Array, "*rows N"]:
    """Round to FP8 E4M3 in blocks of 64, each with a power-of-two scale, and back."""
    blocks = _blocks(x, _FP8_BLOCK)
    peak = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = _power_of_two_above(jnp.maximum(peak, _FP8_FLOOR) / _FP8_MAX)
    size = jnp.minimum(jnp.abs(blocks) / scale, _FP8_MAX)
    # By hand, since not every device has the type: three bits below the leading one,
    # of which the smallest is 2^-6, and rounding half to even.
    exponent = jax.lax.bitcast_convert_type(size, jnp.int32) >> 23
    step = jax.lax.bitcast_convert_type(
        (jnp.maximum(exponent, 127 - 6) - 3) << 23, jnp.float32
    )
    coded = jnp.copysign(jnp.round(size / step) * step, blocks)
    return (coded * scale).reshape(x.shape)


def fp4_round_trip(x: Float[Array, "*rows N"]) -> Float[Array, "*rows N"]:
    """Round to FP4 E2M1 in blocks of 32, each with a power-of-two scale, and back.

    The codes are 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
    """
    blocks = _blocks(x, _FP4_BLOCK)
    peak = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scale = _power_of_two_above(jnp.maximum(peak, _FP4_FLOOR) / _FP4_MAX)
    size = jnp.minimum(jnp.abs(blocks) / scale, _FP4_MAX)
    # Codes are spaced by 1/2 below 2, by 1 below 4 and by 2 above; rounding a
    # multiple of the spacing half to even is the tie rule of the codes.
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    coded = jnp.round(size / step) * step
    return (jnp.copysign(coded, blocks) * scale).reshape(x.shape)


def hadamard(x: Float[Array, "*rows N"]) -> Float[Array, "*rows N"]:
    """Apply the orthonormal Hadamard transform in natural (Sylvester) order.

    N must be a power of two.  The butterfly runs from neighbours outwards, as ds4's.
    """
    width = x.shape[-1]
    half = 1
    while half < width:
        pairs = x.reshape(*x.shape[:-1], width // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x * np.float32(width**-0.5)


def round_kv(row: Float[Array, "*rows K"], rope_dim: int) -> Float[Array, "*rows K"]:
    """Round a raw or compressed row as ds4 caches it.

    FP8 on the channels before the rotary tail, then F16 on all of them (the CPU
    path of ds4, which rounds compressed rows to F16 as well).
    """
    body, tail = row[..., :-rope_dim], row[..., -rope_dim:]
    row = jnp.concatenate([fp8_round_trip(body), tail], axis=-1)
    return row.astype(jnp.float16).astype(jnp.float32)


def round_index(row: Float[Array, "*rows J"]) -> Float[Array, "*rows J"]:
    """Round an indexer query or key: Hadamard, then FP4."""
    return fp4_round_trip(hadamard(row))
