"""The tensors of a safetensors checkpoint, as views of memory-mapped files.

safetensors' own readers know no FP8 in numpy, so its library checks each file and the
views are made here.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ds4jax.errors import FileError

_INDEX = "model.safetensors.index.json"

_STORED = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


def tensors(root: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the checkpoint in `root`, by its name there.

    With a `model.safetensors.index.json`, the files that it lists, which must hold
    what it says; without one, `model.safetensors`.

    Raises:
      FileError: for a file that is missing, truncated or malformed, a tensor that two
        files hold, or an index that does not match.
    """
    if not (root / _INDEX).exists():
        return _read(root / "model.safetensors")
    placed = _index(root / _INDEX)
    found: dict[str, np.ndarray] = {}
    for shard in sorted(set(placed.values())):
        for name, values in _read(root / shard).items():
            if placed.get(name) != shard:
                raise FileError(
                    f"{root / shard}: holds {name}, but {_INDEX} places it in"
                    f" {placed.get(name, 'no file')}"
                )
            found[name] = values
    for name, shard in placed.items():
        if name not in found:
            raise FileError(f"{root / shard}: {name} is missing; {_INDEX} lists it")
    return found


def _index(path: Path) -> dict[str, str]:
    """Return which file holds each tensor."""
    try:
        placed = json.loads(path.read_text())["weight_map"]
        files = [name for name in placed.values() if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: not a safetensors index ({error!r})") from error
    if len(files) != len(placed) or not files:
        raise FileError(
            f"{path}: weight_map: expected names of files beside it, found"
            f" {sorted({str(name) for name in placed.values()} - set(files))}"
        )
    return placed


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one file, none of them read yet."""
    try:
        with safe_open(path, "np"):
            pass  # checks the header, and that the tensors fill the file exactly
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path}: expected a whole safetensors file: {error}; fetch it again"
        ) from error
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    found = {}
    for name, entry in json.loads(raw[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _STORED:
            raise FileError(
                f"{path}: {name}: expected one of {', '.join(_STORED)},"
                f" found type {entry['dtype']}"
            )
        begin, end = entry["data_offsets"]
        values = raw[start + begin : start + end].view(_STORED[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    return found
