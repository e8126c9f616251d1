"""The `ds4jax` command: picks a command's module, reads its flags and runs it.

A command is a module `ds4jax.experiments.NAME` with absl flags at its top, a docstring
that is its help, `main(argv)` that returns None or an exit status, and, where it takes
arguments without dashes, their names in `ARGUMENTS`.  Only the chosen module is
imported, so `ds4jax --help` does not wait for JAX.

Exit status: 0 done; 2 the user's mistake, told in one line; 130 interrupted; 141 the
reader of a pipe left.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from types import ModuleType

from absl import flags

import ds4jax
from ds4jax import xla_flags
from ds4jax.errors import Ds4Error

COMMANDS = {
    "generate": "continue a prompt, speculatively or plainly",
    "score": "write the logits and streams that a model gives a text",
    "bench": "measure reading and decoding speed against the context",
    "check": "say whether every way of decoding does what it promises",
    "inspect": "what is in a GGUF file, and what decoding reads of it",
    "ablate": "measure ways of decoding against each other, with report and figures",
    "compare": "compare the runs.csv of two ablations",
    "train": "train the tiny model",
    "evaluate": "loss and draft acceptance on held-out text",
    "imatrix": "measure which columns of the matrices matter, for convert",
    "convert": "write GGUF files from a Hugging Face checkpoint",
    "synth": "make random weights, in GGUF files or on the device, to measure with",
}
"""The commands, each with its line of `ds4jax --help`."""

EXTRAS = {"matplotlib": "plot", "optax": "train"}
"""Packages that not every command needs, each with the extra that brings it."""


class UsageError(Exception):
    """A command line that cannot be read; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    Args:
      argv: the words after `ds4jax`; those of this process when None.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered has no reader; without this Python would try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"ds4jax {ds4jax.__version__}")
        return 0
    speaker = "ds4jax"
    try:
        name = _command(argv[0])
        xla_flags.set_flags()
        speaker = f"ds4jax {name}"
        module = _module(name)
        if "--help" in argv or "-h" in argv:
            print(_help(name, module))
            return 0
        return module.main([name, *_parse(argv, module)]) or 0
    except (UsageError, Ds4Error) as error:
        print(f"{speaker}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


def _command(word: str) -> str:
    if word in COMMANDS:
        return word
    if word.startswith("-"):
        raise UsageError(f"expected a command before {word}; see --help")
    raise UsageError(f"unknown command '{word}'{_nearest(word, COMMANDS)}")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"ds4jax.experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise UsageError(
            f"needs {error.name}: pip install 'ds4jax[{EXTRAS[error.name]}]'"
        ) from None


def _nearest(word: str, known: Iterable[str], dashes: str = "") -> str:
    """Return how to go on from an unknown word: a suggestion, or where to look."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else "; see --help"


def _parse(argv: list[str], module: ModuleType) -> list[str]:
    """Set the flags on absl's `FLAGS` and return the arguments without dashes.

    Raises:
      UsageError: for an unknown, ill-valued or missing flag or argument.
    """
    own = flags.FLAGS.get_key_flags_for_module(module)
    try:
        arguments = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in own]
        raise UsageError(
            f"unknown flag --{error.flagname}{_nearest(error.flagname, known, '--')}"
        ) from None
    except flags.Error as error:
        absent = re.search(r"--(\w+) must have a value other than None", str(error))
        raise UsageError(
            f"missing {_spelling(flags.FLAGS[absent[1]])}" if absent else str(error)
        ) from None
    except Exception as error:
        # ml_collections runs a config file, which may do anything, as it reads flags.
        if not any(re.match("--?config[.=]", word) for word in argv):
            raise
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise UsageError(f"--config: {type(error).__name__}: {reason}") from None
    expected = _arguments(module)
    if len(arguments) < len(expected):
        raise UsageError(f"missing {expected[len(arguments)]}; see --help")
    if len(arguments) > len(expected):
        raise UsageError(f"unexpected argument '{arguments[len(expected)]}'")
    return arguments


def _arguments(module: ModuleType) -> tuple[str, ...]:
    return getattr(module, "ARGUMENTS", ())


def _choices(flag: flags.Flag) -> str:
    return "|".join(getattr(flag.parser, "enum_values", None) or ())


def _spelling(flag: flags.Flag) -> str:
    """Return how a flag is typed, such as `--context=INT` or `--[no]warm`."""
    if flag.boolean:
        return f"--[no]{flag.name}"
    return f"--{flag.name}={_choices(flag) or flag.flag_type().split()[-1].upper()}"


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "ds4jax COMMAND [flags]",
            "",
            (ds4jax.__doc__ or "").splitlines()[0],
            "",
            *(f"  {name:{width}}{line}" for name, line in COMMANDS.items()),
            "",
            "ds4jax COMMAND --help tells more; ds4jax --version tells the version.",
        ]
    )


def _help(name: str, module: ModuleType) -> str:
    usage = " ".join(["ds4jax", name, *_arguments(module), "[flags]"])
    lines = [usage, "", inspect.getdoc(module) or "", "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(module):
        # absl repeats an enum's choices in its help, and quotes every default.
        text = flag.help.removeprefix(f"<{_choices(flag)}>: ").rstrip(".")
        default = (flag.default_as_str or "''").strip("'")
        if any("other than None" in check.message for check in flag.validators):
            text += " (required)"
        elif default:
            text += f" (default {default})"
        lines += [f"  {_spelling(flag)}"]
        lines += textwrap.wrap(
            f"{text}.", 84, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)
