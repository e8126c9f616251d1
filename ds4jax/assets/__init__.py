"""The small trained model that ships: a trunk, an MTP block and their model card."""

from pathlib import Path

from ds4jax.errors import FileError


def _path(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.is_file():
        raise FileError(f"{path}: the shipped model is not installed; name a file")
    return path


def trunk() -> Path:
    """Return the path of the shipped trunk.

    Raises:
      FileError: if this installation lacks it.
    """
    return _path("trunk.gguf")


def mtp() -> Path:
    """Return the path of the shipped MTP block.

    Raises:
      FileError: if this installation lacks it.
    """
    return _path("mtp.gguf")
