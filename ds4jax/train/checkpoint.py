"""A run's state in one file: written beside and renamed, so it is never half there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ds4jax.errors import ConfigError, FileError
from ds4jax.files import replacing

State = TypeVar("State")


def save(path: Path, state: Any, settings: dict[str, Any]):
    """Write every array of a pytree, and the settings it belongs to.

    Raises:
      FileError: if the file cannot be written.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in leaves}
    with replacing(path) as part:
        safetensors.numpy.save_file(
            arrays, part, metadata={"settings": json.dumps(settings)}
        )


def load(path: Path, like: State, settings: dict[str, Any]) -> State:
    """Read a pytree of numpy arrays of the structure, shapes and types of `like`.

    Args:
      path: what `save` wrote.
      like: arrays or their shapes.
      settings: what the run is asked to be.

    Raises:
      ConfigError: if the checkpoint was made with other settings.
      FileError: if it cannot be read, or holds another state.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            found = json.loads((file.metadata() or {}).get("settings", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileError(
            f"{path}: cannot be read ({error}); delete it to start over"
        ) from error
    for name, asked in settings.items():
        if name not in found or found[name] != asked:
            raise ConfigError(
                f"{name}: {path} was made with {found.get(name)!r}, asked for now is "
                f"{asked!r}; give the same, or another --out"
            )
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    restored = []
    for at, leaf in leaves:
        name = jax.tree_util.keystr(at)
        array = arrays.get(name)
        if array is None or (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            what = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise FileError(
                f"{path}: {name}: expected {leaf.dtype} {leaf.shape}, found {what}; "
                "delete it to start over"
            )
        restored.append(array)
    return jax.tree_util.tree_unflatten(structure, restored)
