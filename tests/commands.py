"""A process in which one command runs again and again.

Commands define flags of the same names, so a process can have but one of them; and a
process for every run would spend most of its time on imports.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from absl.testing import flagsaver

from ds4jax import cli


class Command:
    """A command, ready to run.

    Attributes:
      environment: what its next runs find in `os.environ`, beside what is there.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.environment: dict[str, str] = {}

    def run(self, folder: Path, *words: object) -> tuple[int, str, str]:
        """Return status, output and errors of the command, run in `folder`."""
        assert self._process.stdin and self._process.stdout
        asked = str(folder), self.environment, [str(word) for word in words]
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return tuple(json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def command(name: str) -> Iterator[Command]:
    """Start the process of a command; it ends with the block."""
    with subprocess.Popen(
        [sys.executable, __file__, name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield Command(process)


def serve(name: str):
    """Run what comes by the standard input, a line each."""
    importlib.import_module(f"ds4jax.experiments.{name}")
    # As in conftest.py; nor is what was imported ever garbage.
    gc.set_threshold(50_000)
    gc.freeze()
    usual = dict(os.environ)
    for line in sys.stdin:
        folder, environment, words = json.loads(line)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(usual | environment)
        # Where ml_collections looks for the fields of a config that are given.
        sys.argv = ["ds4jax", name, *words]
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            flagsaver.flagsaver(),
        ):
            status = cli.main([name, *words])
        print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
