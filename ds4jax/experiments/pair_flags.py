"""What the commands that write models share: where to, a trunk and its MTP block.

A command gets the flags with `flags.adopt_module_key_flags(pair_flags)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from ds4jax.errors import ConfigError
from ds4jax.files import check_place, replacing

_OUT = flags.DEFINE_string("out", None, "Trunk file to write.")
_MTP_OUT = flags.DEFINE_string(
    "mtp_out", None, "File to write for the MTP block; without it none is written."
)


def out() -> Path:
    """Return where the trunk goes.

    Raises:
      ConfigError: if that is not said.
    """
    if _OUT.value is None:
        raise ConfigError("missing --out=STRING")
    return Path(_OUT.value)


def given() -> list[str]:
    """Return the names of those of the flags that are on the command line."""
    return [flag.name for flag in (_OUT, _MTP_OUT) if flag.present]


def mtp_out() -> Path | None:
    """Return where the MTP block goes, None for nowhere.

    Raises:
      ConfigError: if that is the trunk's place, or as `out`.
    """
    if _MTP_OUT.value is None:
        return None
    path = Path(_MTP_OUT.value)
    if path.resolve() == out().resolve():
        raise ConfigError(f"--mtp_out={path}: expected another file than --out")
    return path


@contextlib.contextmanager
def writing(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield where to write files, which appear when the block has written them all.

    Raises:
      FileError: if one cannot be written; then none is.
    """
    for path in paths:
        check_place(path)
    with contextlib.ExitStack() as stack:
        # Each is moved into place as the stack unwinds.
        yield [stack.enter_context(replacing(path)) for path in paths]
