"""A checkpoint's tensors under their GGUF names, checked at once and read on demand.

The official storage, FP8 in blocks of 128x128 and FP4 in blocks of 32, both with E8M0
scales, is dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from ds4jax import schema
from ds4jax.config import ModelConfig
from ds4jax.errors import FileError
from ds4jax.hf.names import Piece, official, pieces

Tensors = Mapping[str, np.ndarray]

_PLAIN = (np.float32, np.float16, ml_dtypes.bfloat16)
_FP8 = ml_dtypes.float8_e4m3fn
_FP4_PAIR = np.int8
_FP4 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)


class Weights(Mapping[str, np.ndarray]):
    """Tensors by GGUF name, each assembled in float32 (tables: int32) when asked for.

    Nothing is kept: host memory holds what the caller holds.  The routed experts of
    a layer are one tensor, so at Flash's size one look-up is 8.6 GB.
    """

    def __init__(
        self,
        where: str,
        specs: dict[str, schema.TensorSpec],
        parts: dict[str, list[Piece]],
        tensors: Tensors,
        experts: int,
    ):
        self._where = where
        self._specs = specs
        self._parts = parts
        self._tensors = tensors
        self._experts = experts

    def __getitem__(self, gguf: str) -> np.ndarray:
        """Return one tensor, of its shape in `schema`.

        Raises:
          FileError: if a routing table names an expert that does not exist.
        """
        spec, parts = self._specs[gguf], self._parts[gguf]
        if spec.group == "table":
            return self._table(parts[0].name)
        if parts[0].expert is None:
            return self._values(parts[0])
        stacked = np.empty(spec.shape, np.float32)
        for part in parts:
            stacked[part.expert] = self._values(part)
        return stacked

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _values(self, part: Piece) -> np.ndarray:
        stored, scale = self._tensors[part.name], _scale(self._tensors, part.name)
        if scale is not None:
            return _dequantise(stored, scale)
        if part.half is not None:
            stored = np.split(stored, 2, axis=1)[part.half]
        return stored.astype(np.float32)

    def _table(self, name: str) -> np.ndarray:
        stored = self._tensors[name]
        for found in (stored.min(), stored.max()):
            if not 0 <= found < self._experts:
                raise FileError(
                    f"{self._where}: {name}: expected expert ids in"
                    f" 0..{self._experts - 1}, found {found}"
                )
        return stored.astype(np.int32)


def named(
    config: ModelConfig, tensors: Tensors, where: str = "weights"
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Return the trunk's and the MTP block's tensors by GGUF name.

    Args:
      config: the architecture, which fixes every name and shape.
      tensors: a state dictionary in any of the spellings of `names`.
      where: what to call it in a message.

    Returns:
      (trunk, mtp); mtp is empty if `tensors` has none of it.

    Raises:
      FileError: for a tensor that is missing, unknown, there twice, or of another
        type or shape.
    """
    found: dict[str, dict[int | None, Piece]] = {}
    for name in tensors:
        if _is_scale(tensors, name):
            continue
        held = pieces(name)
        if not held:
            raise FileError(f"{where}: {name}: unknown tensor for a deepseek_v4 model")
        for piece in held:
            same = found.setdefault(piece.gguf, {}).setdefault(piece.expert, piece)
            if same is not piece:
                raise FileError(
                    f"{where}: {same.name} and {name} are the same tensor"
                    f" ({piece.gguf}); keep one"
                )
    trunk = _take(where, schema.trunk(config), found, tensors, config.experts)
    mtp = {}
    if any(gguf.startswith("mtp.") for gguf in found):
        mtp = _take(where, schema.mtp(config), found, tensors, config.experts)
    for parts in found.values():
        raise FileError(
            f"{where}: {next(iter(parts.values())).name}: config.json has no such"
            " tensor; does it belong to these weights?"
        )
    return trunk, mtp


def _take(
    where: str,
    specs: dict[str, schema.TensorSpec],
    found: dict[str, dict[int | None, Piece]],
    tensors: Tensors,
    experts: int,
) -> Weights:
    """Move what `specs` asks for out of `found`, refusing what is not as asked."""
    parts = {}
    for gguf, spec in specs.items():
        by_expert = found.pop(gguf, {})
        single = not by_expert or None in by_expert
        for wanted in (None,) if single else range(experts):
            if wanted not in by_expert:
                which = "" if wanted is None else f" (expert {wanted})"
                raise FileError(f"{where}: {official(gguf)}{which} is missing")
            piece = by_expert.pop(wanted)
            _check(where, tensors, piece, spec)
            parts.setdefault(gguf, []).append(piece)
        for piece in by_expert.values():
            raise FileError(
                f"{where}: {piece.name}: one tensor too many for {gguf},"
                f" {list(spec.shape)}; does config.json belong to these weights?"
            )
    return Weights(where, specs, parts, tensors, experts)


def _check(where: str, tensors: Tensors, piece: Piece, spec: schema.TensorSpec):
    """Refuse a tensor whose type or shape cannot be what its GGUF name asks for."""
    stored, scale = tensors[piece.name], _scale(tensors, piece.name)
    expected = "float32, float16 or bfloat16, or FP8 or FP4 with scales"
    if spec.group == "table":
        expected, fits = "int32 or int64", stored.dtype in (np.int32, np.int64)
    elif scale is None:
        fits = stored.dtype in _PLAIN
    else:
        fits = stored.dtype in (_FP8, _FP4_PAIR) and stored.ndim == 2
    if not fits:
        scales = "no scales" if scale is None else "scales"
        raise FileError(
            f"{where}: {piece.name}: expected {expected},"
            f" found {stored.dtype} with {scales}"
        )
    shape = piece.shape(spec.shape)
    values = stored.shape if scale is None else _shape(stored)
    if values != shape:
        raise FileError(
            f"{where}: {piece.name}: expected shape {list(shape)},"
            f" found {list(values)}; does config.json belong to these weights?"
        )
    if scale is not None:
        blocks = tuple(-(-n // b) for n, b in zip(shape, _block(stored), strict=True))
        if scale.shape != blocks:
            raise FileError(
                f"{where}: scale of {piece.name}: expected shape {list(blocks)},"
                f" found {list(scale.shape)}"
            )


def _scale(tensors: Tensors, name: str) -> np.ndarray | None:
    """Return the block scales of the weight `name`, if it is a quantised one."""
    scale = tensors.get(name.removesuffix(".weight") + ".scale")
    return tensors.get(f"{name}_scale_inv") if scale is None else scale


def _is_scale(tensors: Tensors, name: str) -> bool:
    """Say whether `name` holds the block scales of a weight that is there."""
    stem, _, leaf = name.rpartition(".")
    return leaf in ("scale", "weight_scale_inv") and f"{stem}.weight" in tensors


def _shape(stored: np.ndarray) -> tuple[int, ...]:
    """Return the shape in values: a byte holds two FP4 numbers."""
    rows, width = stored.shape
    return rows, 2 * width if stored.dtype == _FP4_PAIR else width


def _block(stored: np.ndarray) -> tuple[int, int]:
    """Return the [out, in] extent of the values that share a scale."""
    return (1, 32) if stored.dtype == _FP4_PAIR else (128, 128)


def _dequantise(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return FP8 or FP4 values times their scales, float32 [out, in].

    The low nibble of an FP4 byte is the even column.
    """
    if stored.dtype == _FP4_PAIR:
        codes = stored.view(np.uint8)
        values = _FP4[np.stack([codes & 15, codes >> 4], -1).reshape(_shape(stored))]
    else:
        values = stored.astype(np.float32)
    grid = scale.astype(np.float32)
    for axis, length in enumerate(_block(stored)):
        grid = np.repeat(grid, length, axis)
    return values * grid[: values.shape[0], : values.shape[1]]
