"""Files are written beside their place and moved there when they are complete."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ds4jax.errors import FileError


def check_place(path: Path):
    """Try, before the work, whether a file can be written to `path`.

    Raises:
      FileError: if it cannot.
    """
    with _writing(path):
        # A device such as /dev/null would be replaced, not written to.
        if path.exists() and not path.is_file():
            raise FileExistsError(None, "it is not a regular file")
        tempfile.TemporaryFile(dir=path.parent).close()


def make_folder(flag: str, path: str) -> Path:
    """Return the folder that a flag names, made if it is not there.

    Raises:
      FileError: if it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--{flag}={path}: {error.strerror}") from None
    return folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file; it is moved to `path` if the block succeeds.

    Once there it is also on the disk: a power cut leaves the old file or the new one.

    Raises:
      FileError: if either cannot be done.
    """
    with (
        _writing(path),
        tempfile.TemporaryDirectory(prefix=".ds4jax-", dir=path.parent) as room,
    ):
        part = Path(room) / path.name
        yield part
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)


def _flush(path: Path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{path}: cannot be written: {reason}") from error


def write_table(path: Path, rows: Sequence[Mapping[str, object]]):
    """Write rows as CSV, whole or not at all; the first one's keys head the columns.

    Raises:
      FileError: if it cannot be written.
    """
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
