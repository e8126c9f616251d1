"""Block-quantised tensors as separate planes, and their exact values in `jnp`.

A ggml block interleaves quants, scales and minima; a `QuantTensor` keeps each in its
own aligned array.  `dequantize` is the reference of every kernel and the fallback
where there is none; it gives the bits of gguf-py's `quants.dequantize` (and so of
llama.cpp), eagerly and under `jax.jit`:

 * In every format each product is exact in float32.  The widest are Q6_K's, 11 bits of
   a float16 scale + 7 of the sub-scale + 5 of the quant = 23.  So neither the order of
   the factors nor contraction of `a * b - c` into a fused multiply-add can change a
   bit: at most one rounding, that of the subtraction, ever happens.
 * A float16 subnormal is a normal float32, hence no value is flushed to zero.  Only
   MXFP4 reaches float32 subnormals, which XLA flushes in arithmetic on the CPU: its
   values come from a table, and copying keeps their bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gguf import quants as gguf_quants
from jaxtyping import Array, UInt8

from ds4jax.errors import ConfigError
from ds4jax.iq2_grid import IQ2_GRID

Fields = tuple[np.ndarray, ...]
"""What a block is made of, in the order of its bytes."""


@struct.dataclass
class QuantTensor:
    """A block-quantised tensor: a pytree of planes whose leading axes are its own.

    Indexing every plane indexes the tensor, so `jax.tree.map(lambda p: p[ids], q)`
    gathers experts, also under `jit`.  The shape is therefore read off the planes.

    Planes of a `[..., n]` tensor, in ggml's order within a block unless said.  What the
    kernels multiply comes in words, the first value in the lowest bits:

    | format  | planes |
    |---------|--------|
    | Q8_0    | quants u32 [..., n/4], d f16 [..., n/32] |
    | Q2_K    | quants u32 [..., n/16], scales u32 [..., n/64] (low nibble of a byte: scale, high: minimum; a word has those of the four values in each byte of four words of quants), d and dmin f16 [..., n/256] |
    | Q4_K    | quants u32 [..., n/8], scales and mins u8 [..., n/32], d and dmin f16 [..., n/256] |
    | Q6_K    | low u8 [..., n/2], high u8 [..., n/4], scales i8 [..., n/16], d f16 [..., n/256] |
    | IQ2_XXS | grid u32 [..., n/32] (4 grid rows of 8 bits), signs u32 [..., n/32] (bit 4 i + j: whether an odd number of the weights 0 ... i of grid row j is negative, i < 7; 4-bit scale on top), d f16 [..., n/256] |
    | MXFP4   | quants u8 [..., n/2], exponents u8 [..., n/32] |

    Attributes:
      format: the ggml type name, static.
      planes: numpy or JAX arrays by name.
    """  # noqa: E501

    format: str = struct.field(pytree_node=False)
    planes: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the dequantised tensor, numpy order."""
        name, per_item = _FORMATS[self.format].measure
        *leading, items = self.planes[name].shape
        return (*leading, items * per_item)

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes.values())


def pack(format: str, raw: UInt8[np.ndarray, "... row_bytes"]) -> QuantTensor:
    """Split ggml blocks, as they lie in a file, into numpy planes.

    Args:
      format: ggml type name.
      raw: uint8 `[..., bytes of a row]`, e.g. a memory map; it is copied.

    Raises:
      ConfigError: for a format without planes, or rows that are not whole blocks.
    """
    if format not in _FORMATS:
        raise ConfigError(
            f"format: expected one of {', '.join(_FORMATS)}, found {format!r}"
        )
    layout = _FORMATS[format]
    if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % layout.block_bytes:
        raise ConfigError(
            f"{format}: expected uint8 rows of whole {layout.block_bytes}-byte blocks,"
            f" found {raw.dtype} {raw.shape}"
        )
    *leading, row_bytes = raw.shape
    blocks = np.asarray(raw).reshape(*leading, -1, layout.block_bytes)
    planes = layout.split(blocks)
    return QuantTensor(
        format=format,
        planes={
            name: np.ascontiguousarray(plane).reshape(*leading, -1)
            for name, plane in planes.items()
        },
    )


def unpack(tensor: QuantTensor) -> UInt8[np.ndarray, "... row_bytes"]:
    """Return the ggml blocks of a tensor: the inverse of `pack`, bit for bit.

    Returns:
      uint8 `[..., bytes of a row]`, as it lies in a file.

    Raises:
      ConfigError: for scales or minima of Q4_K that do not fit their 6 bits.
    """
    layout = _FORMATS[tensor.format]
    *leading, width = tensor.shape
    blocks = (*leading, width // layout.block)
    planes = {
        name: np.asarray(plane).reshape(*blocks, -1)
        for name, plane in tensor.planes.items()
    }
    fields = [
        np.ascontiguousarray(field).view(np.uint8) for field in layout.merge(**planes)
    ]
    return np.concatenate(fields, axis=-1).reshape(*leading, -1)


def dequantize(tensor: QuantTensor | Array | np.ndarray) -> Array:
    """Return the float32 values of a tensor; a plain float array is only cast.

    Shape and axis order are those of `tensor.shape`.
    """
    if not isinstance(tensor, QuantTensor):
        return jnp.asarray(tensor, jnp.float32)
    planes = {name: jnp.asarray(plane) for name, plane in tensor.planes.items()}
    return _FORMATS[tensor.format].join(**planes).reshape(tensor.shape)


def _field(blocks: np.ndarray, start: int, stop: int, dtype: Any) -> np.ndarray:
    """Return a copy of bytes `start:stop` of every block as `dtype`."""
    return blocks[..., start:stop].copy().view(dtype)


def _bytes(words: Array, dtype: Any = jnp.uint8) -> Array:
    """Return the bytes of `[..., n]` words, `[..., 4 n]`, the lowest first."""
    split = jax.lax.bitcast_convert_type(words, dtype)
    return split.reshape(*words.shape[:-1], -1)


def _f32(scale: Array, *trailing: int) -> Array:
    """Return one float32 per block, with unit axes to broadcast over the block."""
    return scale.astype(jnp.float32).reshape(*scale.shape, *trailing)


def _bits(packed: Array, group: int, width: int) -> Array:
    """Unpack `width`-bit fields, lowest first, of each `group` bytes.

    `[..., n]` becomes `[..., n/group, 8/width, group]`: ggml stores values a whole
    group apart in one byte.
    """
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
    fields = packed.reshape(*packed.shape[:-1], -1, 1, group) >> shifts
    return fields & jnp.uint8(2**width - 1)


def _split_q8_0(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "quants": _field(blocks, 2, 34, "<u4"),
        "d": _field(blocks, 0, 2, "<f2"),
    }


def _merge_q8_0(quants: np.ndarray, d: np.ndarray) -> Fields:
    return d, quants


def _join_q8_0(quants: Array, d: Array) -> Array:
    values = _bytes(quants, jnp.int8).reshape(*d.shape, 32).astype(jnp.float32)
    return values * _f32(d, 1)


def _split_q2_k(blocks: np.ndarray) -> dict[str, np.ndarray]:
    scales = _field(blocks, 0, 16, np.uint8)
    return {
        "quants": _field(blocks, 16, 80, "<u4"),
        "scales": np.ascontiguousarray(_swap_q2_k(scales, 4, 2)).view("<u4"),
        "d": _field(blocks, 80, 82, "<f2"),
        "dmin": _field(blocks, 82, 84, "<f2"),
    }


def _merge_q2_k(
    quants: np.ndarray, scales: np.ndarray, d: np.ndarray, dmin: np.ndarray
) -> Fields:
    return _swap_q2_k(scales.view(np.uint8), 2, 4), quants, d, dmin


def _swap_q2_k(scales: Any, rows: int, columns: int) -> Any:
    """Transpose each 8 of the 16 scales of blocks, seen as [rows, columns].

    In a file bits 2 s of 16 bytes of quants have scale [s, half]; here [half, s], for
    the kernel takes the 16 bytes at once.
    """
    eights = scales.reshape(*scales.shape[:-1], -1, rows, columns)
    return eights.swapaxes(-1, -2).reshape(scales.shape)


def _join_q2_k(quants: Array, scales: Array, d: Array, dmin: Array) -> Array:
    values = _bits(_bytes(quants), 32, 2).reshape(*d.shape, 16, 16).astype(jnp.float32)
    scales = _swap_q2_k(_bytes(scales), 2, 4).reshape(*d.shape, 16, 1)
    return _f32(d, 1, 1) * (scales & 15) * values - _f32(dmin, 1, 1) * (scales >> 4)


def _split_q4_k(blocks: np.ndarray) -> dict[str, np.ndarray]:
    first, second, high = np.split(_field(blocks, 4, 16, np.uint8), 3, axis=-1)
    # Sub-blocks 0-3 hold 6 whole bits; 4-7 keep their low nibbles in `high` and their
    # top two bits above those of sub-blocks 0-3.
    scales = (first & 63, (high & 15) | (first >> 2 & 48))
    mins = (second & 63, (high >> 4) | (second >> 2 & 48))
    return {
        "quants": _field(blocks, 16, 144, "<u4"),
        "scales": np.concatenate(scales, axis=-1),
        "mins": np.concatenate(mins, axis=-1),
        "d": _field(blocks, 0, 2, "<f2"),
        "dmin": _field(blocks, 2, 4, "<f2"),
    }


def _merge_q4_k(
    quants: np.ndarray,
    scales: np.ndarray,
    mins: np.ndarray,
    d: np.ndarray,
    dmin: np.ndarray,
) -> Fields:
    for name, plane in (("scales", scales), ("mins", mins)):
        if (largest := plane.max(initial=0)) > 63:
            raise ConfigError(f"Q4_K: {name}: expected 6 bits, found {largest}")
    (low_s, high_s), (low_m, high_m) = (np.split(p, 2, -1) for p in (scales, mins))
    first, second = low_s | (high_s & 48) << 2, low_m | (high_m & 48) << 2
    return d, dmin, first, second, (high_s & 15) | high_m << 4, quants


def _join_q4_k(
    quants: Array, scales: Array, mins: Array, d: Array, dmin: Array
) -> Array:
    values = _bits(_bytes(quants), 32, 4).reshape(*d.shape, 8, 32).astype(jnp.float32)
    scales = scales.reshape(*d.shape, 8, 1)
    mins = mins.reshape(*d.shape, 8, 1)
    return _f32(d, 1, 1) * scales * values - _f32(dmin, 1, 1) * mins


def _split_q6_k(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "low": _field(blocks, 0, 128, np.uint8),
        "high": _field(blocks, 128, 192, np.uint8),
        "scales": _field(blocks, 192, 208, np.int8),
        "d": _field(blocks, 208, 210, "<f2"),
    }


def _merge_q6_k(
    low: np.ndarray, high: np.ndarray, scales: np.ndarray, d: np.ndarray
) -> Fields:
    return low, high, scales, d


def _join_q6_k(low: Array, high: Array, scales: Array, d: Array) -> Array:
    low = _bits(low, 64, 4).reshape(*d.shape, 16, 16)
    high = _bits(high, 32, 2).reshape(*d.shape, 16, 16)
    values = (low | high << 4).astype(jnp.float32) - 32
    return _f32(d, 1, 1) * scales.reshape(*d.shape, 16, 1) * values


def _split_iq2_xxs(blocks: np.ndarray) -> dict[str, np.ndarray]:
    groups = _field(blocks, 2, 66, "<u4")
    signs = _transpose_signs(groups[..., 1::2], (7, 1), (1, 4))
    for shift in (4, 8, 16):
        signs ^= signs << shift & _SIGNS
    return {
        "grid": groups[..., 0::2],
        "signs": signs,
        "d": _field(blocks, 0, 2, "<f2"),
    }


def _merge_iq2_xxs(grid: np.ndarray, signs: np.ndarray, d: np.ndarray) -> Fields:
    signs = signs ^ signs << 4 & _SIGNS
    signs = _transpose_signs(signs, (1, 4), (7, 1))
    groups = np.stack([grid, signs], axis=-1)
    return d, groups.reshape(*grid.shape[:-1], -1)


_SIGNS = np.uint32(0x0FFFFFFF)
"""Where IQ2_XXS's signs are in their words."""


def _transpose_signs(
    words: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
    """Move sign i of row j from bit `old @ (j, i)` to `new @ (j, i)`."""
    moved = words & ~_SIGNS
    for j in range(4):
        for i in range(7):
            bit = words >> (old[0] * j + old[1] * i) & 1
            moved |= bit << (new[0] * j + new[1] * i)
    return moved


def _join_iq2_xxs(grid: Array, signs: Array, d: Array) -> Array:
    rows = grid.reshape(*d.shape, 8, 1) >> jnp.arange(0, 32, 8, dtype=jnp.uint32)
    magnitudes = jnp.asarray(IQ2_GRID)[rows & 255]
    scale = _f32(d, 1) * (0.5 + (signs >> 28).reshape(*d.shape, 8)) * 0.25
    # The eighth sign of a row makes the number of negatives even.
    signs = (signs & _SIGNS) ^ signs << 4
    place = jnp.arange(4, dtype=jnp.uint32)[:, None] + 4 * jnp.arange(
        8, dtype=jnp.uint32
    )
    negative = signs.reshape(*d.shape, 8, 1, 1) >> place & 1
    return scale[..., None, None] * jnp.where(negative, -magnitudes, magnitudes)


def _split_mxfp4(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "quants": _field(blocks, 1, 17, np.uint8),
        "exponents": _field(blocks, 0, 1, np.uint8),
    }


def _merge_mxfp4(quants: np.ndarray, exponents: np.ndarray) -> Fields:
    return exponents, quants


def _mxfp4_values() -> np.ndarray:
    # Doubled E2M1 codes times 2^(e - 128); float64 holds each exactly, and float32 too
    # except those that overflow to infinity at e = 255, as they do in gguf-py.
    doubled = np.asarray(gguf_quants.MXFP4.kvalues, np.float64)
    with np.errstate(over="ignore"):
        return (doubled * 2.0 ** (np.arange(256.0)[:, None] - 128)).astype(np.float32)


_MXFP4_VALUES = _mxfp4_values()


def _join_mxfp4(quants: Array, exponents: Array) -> Array:
    codes = _bits(quants, 16, 4)
    return jnp.asarray(_MXFP4_VALUES)[exponents[..., None, None], codes]


@dataclasses.dataclass(frozen=True)
class _Format:
    """How one ggml type is stored.

    Attributes:
      block: values of a block.
      block_bytes: bytes of a block.
      measure: a plane and its values per item.
      split, merge: from bytes `[..., blocks, block_bytes]` to planes
        `[..., blocks, items of a block]`, and back to the fields of a block.
      join: from planes `[..., items of a row]` to values.
    """

    block: int
    block_bytes: int
    measure: tuple[str, int]
    split: Callable[[np.ndarray], dict[str, np.ndarray]]
    merge: Callable[..., Fields]
    join: Callable[..., Array]


_FORMATS = {
    "Q8_0": _Format(32, 34, ("quants", 4), _split_q8_0, _merge_q8_0, _join_q8_0),
    "Q2_K": _Format(256, 84, ("quants", 16), _split_q2_k, _merge_q2_k, _join_q2_k),
    "Q4_K": _Format(256, 144, ("quants", 8), _split_q4_k, _merge_q4_k, _join_q4_k),
    "Q6_K": _Format(256, 210, ("low", 2), _split_q6_k, _merge_q6_k, _join_q6_k),
    "IQ2_XXS": _Format(
        256, 66, ("grid", 32), _split_iq2_xxs, _merge_iq2_xxs, _join_iq2_xxs
    ),
    "MXFP4": _Format(32, 17, ("quants", 2), _split_mxfp4, _merge_mxfp4, _join_mxfp4),
}

FORMATS = tuple(_FORMATS)
"""The ggml types that `pack`, `unpack` and `dequantize` know."""
