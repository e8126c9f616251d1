"""The errors a user can cause.

Each message is one line that names what was wrong (file, tensor, key, flag, value)
and, where it helps, how to mend it.  Commands print it and exit with status 2; a
traceback therefore always means a defect of ds4jax itself.
"""

from typing import Any


class Ds4Error(Exception):
    """Base of every error that ds4jax raises on purpose."""


class ConfigError(Ds4Error, ValueError):
    """A hyper-parameter, metadata key or flag is missing or has a wrong value."""


class FileError(Ds4Error, ValueError):
    """A file cannot be used: not there, malformed, truncated or of another model."""


class TokenError(Ds4Error, ValueError):
    """A token id or piece of text that the vocabulary cannot express."""


class CapacityError(Ds4Error, RuntimeError):
    """A request that does not fit: context, ring budget or memory."""


def expect(name: str, holds: bool, expected: str, found: Any):
    """Raise a ConfigError about the setting `name` unless it `holds`."""
    if not holds:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")
