"""Packed weights as tiles of bfloat16 within a kernel, on NVIDIA GPUs.

A step takes COLUMNS of some rows, a thread a few words of them, and what a thread makes
of its words stays with it: eight columns that lie side by side go to shared memory in
one store.  Those that go together come from eight places: rows, or groups of a row.
Where these would share banks, the step's columns are in another order, and the operand
is brought into it; a sum does not mind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16

from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.pallas.fixed_point import assembly
from ds4jax.pallas.k_quants import unpack_q2_k, unpack_q4_k
from ds4jax.quant import QuantTensor

COLUMNS = 128
"""Of a step; half a block of each format."""

_LEVELS = np.unique(IQ2_GRID)
_CODES = (np.searchsorted(_LEVELS, IQ2_GRID) << np.arange(0, 32, 4)).sum(1, np.uint32)
"""Of the grid's rows, the place of weight i's level in nibble i."""


class Format(NamedTuple):
    """How a kernel multiplies by one ggml type.

    Attributes:
      ahead: whether the kernel loads a step ahead, as Triton does itself unless a load
        waits for another.
      arrange: brings rows [R, In] into the order of `decode`'s columns.
      operands: arrays of a weight.
      load: given refs of a weight's operands, an expert, which of its rows [N] and the
        step, what `decode` needs of them.
      decode: given those refs, what was loaded, and whether it is interpreted, the
        weights [N, COLUMNS].
    """

    ahead: bool
    arrange: Callable[[Array], Array]
    operands: Callable[[QuantTensor], list[Array]]
    load: Callable[..., tuple[Any, ...]]
    decode: Callable[..., BFloat16[Array, "N columns"]]


def _joined(values: list[Array]) -> Array:
    """Return arrays [...] as one [..., 2, 2, ..], whose last axes count them."""
    while len(values) > 1:
        half = len(values) // 2
        pairs = zip(values[:half], values[half:], strict=True)
        # Two at a time is what Triton joins.
        values = [jnp.stack(pair, -1) for pair in pairs]
    return values[0]


def _halves(pairs: Array) -> list[Array]:
    """Return the lower and the upper bfloat16 of words."""
    words = jax.lax.bitcast_convert_type(pairs, jnp.uint32)
    halves = (half.astype(jnp.uint16) for half in (words, words >> 16))
    return [jax.lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]


def _k_format(
    bits: int,
    scales: Sequence[str],
    read: Callable[..., list[Array]],
    unpack: Callable[[list[Array]], list[tuple[Array, Array]]],
    order: tuple[int, ...],
) -> Format:
    """Return the format of words whose bytes are columns, and their bits levels.

    Args:
      bits: of a value.
      scales: planes of scales and minima.
      read: given their refs, an expert, rows and groups, what holds these.
      unpack: that into each level's scale and minimum.
      order: of rows, groups, words, levels and bytes, which makes columns natural.
    """
    levels, words = 8 // bits, 2 * bits
    groups = COLUMNS // (4 * levels * words)

    def load(refs, expert, rows, step):
        quants_ref, d_ref, dmin_ref, *scale_refs = refs
        rows = rows[:, None, None]
        group = (step * groups + jnp.arange(groups))[None, :, None]
        block = (step * COLUMNS // 256 + jnp.arange(1))[None, None]
        return (
            quants_ref[expert, rows, group * words + jnp.arange(words)],
            d_ref[expert, rows, block],
            dmin_ref[expert, rows, block],
            read(scale_refs, expert, rows, group),
        )

    def decode(refs, loaded, interpret):
        quants, d, dmin, packed = loaded
        d, dmin = d.astype(jnp.float32), dmin.astype(jnp.float32)
        values = []
        for level, pair in enumerate(unpack(packed)):
            scale, least = (part.astype(jnp.float32) for part in pair)
            own = quants >> np.uint32(bits * level)
            of_level = _picked if bits == 2 and not interpret else _computed
            values += of_level(own, d * scale, dmin * least, bits)
        parts = _joined(values).reshape(len(quants), groups, words, levels, 4)
        return parts.transpose(order).reshape(len(quants), COLUMNS)

    names = ("quants", "d", "dmin", *scales)
    operands = lambda w: [w.planes[name] for name in names]  # noqa: E731
    return Format(False, lambda x: x, operands, load, decode)


def _computed(quants: Array, scale: Array, least: Array, bits: int) -> list[Array]:
    """Return the weights whose values are the lowest bits of each byte."""
    values = [(quants >> np.uint32(8 * byte)) & (2**bits - 1) for byte in range(4)]
    as_float = (value.astype(jnp.int32).astype(jnp.float32) for value in values)
    return [(scale * value - least).astype(jnp.bfloat16) for value in as_float]


def _picked(quants: Array, scale: Array, least: Array, bits: int) -> list[Array]:
    """Do the same by picking from the weights of all four values."""
    assert bits == 2
    weights = [
        jax.lax.bitcast_convert_type(scale * value - least, jnp.int32)
        for value in (0.0, 1.0, 2.0, 3.0)
    ]
    low, high = (
        assembly("cvt.rn.bf16x2.f32 $0, $2, $1;", *two)
        for two in (weights[:2], weights[2:])
    )
    # The two bytes of a value v are 2 v and 2 v + 1 of both words.
    selector = (quants & 0x03030303) * np.uint32(0x22) + np.uint32(0x10101010)
    pairs = (
        assembly("prmt.b32 $0, $1, $2, $3;", low, high, half)
        for half in (selector, selector >> 16)
    )
    return [value for pair in pairs for value in _halves(pair)]


def _read_q2_k(refs, expert, rows, group):
    return [ref[expert, rows, group] for ref in refs]


def _read_q4_k(refs, expert, rows, group):
    return [ref[expert, rows, group * 2 + level] for level in range(2) for ref in refs]


def _arrange_iq2(x: Array) -> Array:
    """Bring the first halves of a step's units before the second ones."""
    return x.reshape(len(x), -1, 4, 2, 16).swapaxes(2, 3).reshape(x.shape)


def _iq2_operands(w: QuantTensor) -> list[Array]:
    planes = w.planes
    return [jnp.asarray(_CODES), planes["grid"], planes["signs"], planes["d"]]


def _load_iq2(refs, expert, rows, step):
    _, grid_ref, signs_ref, d_ref = refs
    rows, units = rows[:, None], COLUMNS // 32
    at = expert, rows, (step * units + jnp.arange(units))[None]
    block = (step * COLUMNS // 256 + jnp.arange(1))[None]
    return grid_ref[at], signs_ref[at], d_ref[expert, rows, block]


def _decode_iq2(refs, loaded, interpret):
    codes_ref, (grid, signs, d) = refs[0], loaded
    d = d.astype(jnp.float32)
    scale = d * (0.5 + (signs >> 28).astype(jnp.int32).astype(jnp.float32)) * 0.25
    # See `QuantTensor`: a sign is the parity of its bit and of those before it.
    negative = (signs & 0x0FFFFFFF) ^ (signs << 4)
    values = []
    for four in range(4):
        codes = codes_ref[((grid >> (8 * four)) & 255).astype(jnp.int32)]
        selector = codes | (negative >> four & 0x11111111) << 2
        for half in (selector, selector >> 16):
            values += _four_values(half, scale, interpret)
    parts = _joined(values).reshape(*grid.shape, 2, 16)
    return parts.transpose(0, 2, 1, 3).reshape(len(grid), COLUMNS)


def _four_values(selector: Array, scale: Array, interpret: bool) -> list[Array]:
    """Return weights in bfloat16, whose levels and signs four nibbles say."""
    if interpret:
        nibbles = [selector >> (4 * place) for place in range(4)]
        one, two, three = (float(level) for level in _LEVELS)
        size = lambda code: jnp.where(code == 0, one, jnp.where(code == 1, two, three))  # noqa: E731
        sign = lambda nibble: jnp.where(nibble & 4 > 0, -1, 1)  # noqa: E731
        return [
            (sign(nibble) * size(nibble & 3) * scale).astype(jnp.bfloat16)
            for nibble in nibbles
        ]
    # The two bytes of 8, 25 and 43 as bfloat16, and of -8, -25 and -43.
    low = assembly("prmt.b32 $0, 0x002CC800, 0x002CC800, $1;", selector)
    high = assembly("prmt.b32 $0, 0x00424141, 0x00C2C1C1, $1;", selector)
    # In two parts, so that only the product is rounded.
    upper = scale.astype(jnp.bfloat16)
    lower = (scale - upper.astype(jnp.float32)).astype(jnp.bfloat16)
    multiply = (
        "{ .reg .b32 w, t; prmt.b32 w, $1, $2, %s; mul.rn.bf16x2 t, w, $4;"
        " fma.rn.bf16x2 $0, w, $3, t; }"
    )
    pairs = (
        assembly(multiply % pick, low, high, _twice(upper), _twice(lower))
        for pick in ("0x5140", "0x7362")
    )
    return [value for pair in pairs for value in _halves(pair)]


def _twice(x: Array) -> Array:
    """Return words of twice a bfloat16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits * np.uint32(0x10001), jnp.int32)


FORMATS = {
    "Q2_K": _k_format(2, ("scales",), _read_q2_k, unpack_q2_k, (0, 3, 1, 2, 4)),
    "Q4_K": _k_format(4, ("scales", "mins"), _read_q4_k, unpack_q4_k, (0, 1, 3, 2, 4)),
    "IQ2_XXS": Format(True, _arrange_iq2, _iq2_operands, _load_iq2, _decode_iq2),
}
"""By ggml type."""
