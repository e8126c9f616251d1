"""From a checked file to a model's weights, tensor by tensor.

Packing copies one tensor at a time out of the map, and plain tensors stay views of it.
Whoever puts each on a device as it comes never has more than one of them in host
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from ds4jax import quant, schema
from ds4jax.config import ModelConfig
from ds4jax.errors import FileError
from ds4jax.gguf.architecture import config as read_config
from ds4jax.gguf.container import GGUF, read
from ds4jax.quant import QuantTensor

Weights = dict[str, np.ndarray | QuantTensor]

Place = Callable[..., Any]

_TRUNK_ONLY = "token_embd.weight"
_MTP_ONLY = "mtp.0.norm.weight"


def load_trunk(
    path: str | os.PathLike[str], place: Place | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a trunk: its architecture and every tensor of `schema.trunk`.

    Args:
      path: file to read.
      place: what is to become of each tensor once it is checked, such as
        `deepseek.place`; without it the result is `Weights`, in host memory.

    Raises:
      FileError: if it is not a trunk, or a tensor is missing, unexpected, of another
        shape or type, not finite, or routes to an expert that is not there.
      ConfigError: if its metadata does not describe a model.
    """
    file = read(path)
    if _MTP_ONLY in file.tensors and _TRUNK_ONLY not in file.tensors:
        raise FileError(f"{path}: this is an MTP file; expected a trunk")
    config = read_config(file)
    specs = schema.trunk(config)
    _check(file, specs, "its metadata describes another model")
    return config, _load(file, specs, config, place)


def load_mtp(
    path: str | os.PathLike[str], config: ModelConfig, place: Place | None = None
) -> dict[str, Any]:
    """Read the MTP block of the trunk that `config` describes.

    Args:
      path: file to read.
      config: of the trunk.
      place: as of `load_trunk`.

    Raises:
      FileError: as `load_trunk`, or if the block is of another model.
    """
    file = read(path)
    if _TRUNK_ONLY in file.tensors and _MTP_ONLY not in file.tensors:
        raise FileError(f"{path}: this is a trunk; expected an MTP file")
    specs = schema.mtp(config)
    _check(file, specs, "this MTP file belongs to another model than the trunk")
    return _load(file, specs, config, place)


def _check(file: GGUF, specs: Mapping[str, schema.TensorSpec], hint: str):
    """Compare names, shapes and types, before any data is touched."""
    for name, spec in specs.items():
        types = " or ".join(spec.types)
        if name not in file.tensors:
            raise FileError(
                f"{file.path}: tensor {name} is missing: expected {types} of shape"
                f" {spec.shape}"
            )
        found = file.tensors[name]
        if found.shape != spec.shape:
            raise FileError(
                f"{file.path}: tensor {name}: expected shape {spec.shape}, found"
                f" {found.shape}: {hint}"
            )
        if found.type not in spec.types:
            raise FileError(
                f"{file.path}: tensor {name}: expected type {types}, found {found.type}"
            )
    for name, found in file.tensors.items():
        if name not in specs:
            raise FileError(
                f"{file.path}: unexpected tensor {name!r}: a file of this architecture"
                " does not have it"
            )
        if name.endswith("ffn_gate_exps.weight"):
            up = file.tensors[name.replace("ffn_gate", "ffn_up")]
            if found.type != up.type:
                raise FileError(
                    f"{file.path}: tensors {name} and {up.name}: expected one type,"
                    f" found {found.type} and {up.type}"
                )


def _load(
    file: GGUF,
    specs: Mapping[str, schema.TensorSpec],
    config: ModelConfig,
    place: Place | None,
) -> dict[str, Any]:
    weights = {}
    with tqdm(
        desc=file.path.name,
        total=sum(tensor.nbytes for tensor in file.tensors.values()),
        unit="B",
        unit_scale=True,
        disable=None,
        delay=1,
        leave=False,
    ) as bar:
        for name, spec in specs.items():
            weight = _read(file, name, spec, config)
            weights[name] = place(weight) if place else weight
            # Or it would stay while the next one is packed.
            del weight
            bar.update(file.tensors[name].nbytes)
    return weights


def _read(
    file: GGUF, name: str, spec: schema.TensorSpec, config: ModelConfig
) -> np.ndarray | QuantTensor:
    """Return one tensor, its values checked."""
    found = file.tensors[name]
    if spec.group == "table":
        low, high = int(found.data.min()), int(found.data.max())
        if low < 0 or high >= config.experts:
            raise FileError(
                f"{file.path}: tensor {name}: expected expert ids in"
                f" 0..{config.experts - 1}, found {low}..{high}"
            )
        return found.data
    weight = found.data
    if found.type in quant.FORMATS:
        weight = quant.pack(found.type, found.data)
    if flaw := find_flaw(weight):
        raise FileError(f"{file.path}: tensor {name} ({found.type}): found {flaw}")
    return weight


def find_flaw(weight: np.ndarray | QuantTensor) -> str | None:
    """Say where a float array or a tensor's block scales hold NaN or infinity."""
    if isinstance(weight, np.ndarray):
        return None if _is_finite(weight) else "NaN or infinity among its values"
    for name, plane in weight.planes.items():
        if plane.dtype == np.float16 and not _is_finite(plane):
            return f"NaN or infinity among its block scales ({name})"
        if name == "exponents" and plane.max() == 255:  # NaN in the OCP MX formats
            return "NaN among its block scales (exponent 255)"
    return None


def _is_finite(array: np.ndarray) -> bool:
    """Say whether a float array of any width has neither NaN nor infinity.

    Read as integers, floats of one sign are in the order of their magnitudes with NaN
    beyond infinity, and negative ones are the largest unsigned.  So two integer maxima
    tell, with no mask in memory and 30 times faster than float16 comparisons.
    """
    positive, negative = f"i{array.itemsize}", f"u{array.itemsize}"
    infinities = np.array([np.inf, -np.inf], array.dtype)
    return bool(
        array.view(positive).max() < infinities.view(positive)[0]
        and array.view(negative).max() < infinities.view(negative)[1]
    )
