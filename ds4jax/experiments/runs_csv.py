"""runs.csv: a row for every run of an ablation, appended when it is done.

A killed process leaves whole rows and at most a part of one, which the next process
cuts off; so no row is lost or there twice, and a run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds4jax.errors import FileError

Key = tuple[str, str, int, int]
"""Of a row: arm, text, seed, round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A row; its fields are the columns.

    Attributes:
      arm, text, seed, round: the key.  Round 0 is dropped from all statistics.
      mode, depth, verifier, pairing, fill, gate: of the arm.
      tokens: committed.
      seconds: that took, compilation and prefill left out.
      turns: of these, what each turn of the run took.  A turn does the same work in
        every round.
      tokens_per_second: their ratio.
      passes: of the target.
      shared_reads_per_token: passes per token.
      decodes: base passes of chained cycles.
      cold_cycles: continuous cycles without an anchor.
      drafted_1 .. accepted_4: drafts verified and committed, by place.
      target_ms: of a cycle's target passes alone.
      draft_ms: of a cycle's drafts alone.
      sha256: of the committed ids.
      worst_gap: the greatest distance of a token from plain decoding's best, in
        logits; NaN when sampling.
      diverged: share of tokens that plain decoding would not have chosen; as above.
      device, devices, jax, driver, python, commit: of `environment.describe`.
      model: the model's files.
      config: the settings, as JSON.
    """

    arm: str
    text: str
    seed: int
    round: int
    mode: str
    depth: int
    verifier: str
    pairing: str
    fill: bool
    gate: bool
    tokens: int
    seconds: float
    turns: tuple[float, ...]
    tokens_per_second: float
    passes: int
    shared_reads_per_token: float
    decodes: int
    cold_cycles: int
    drafted_1: int
    drafted_2: int
    drafted_3: int
    drafted_4: int
    accepted_1: int
    accepted_2: int
    accepted_3: int
    accepted_4: int
    target_ms: float
    draft_ms: float
    sha256: str
    worst_gap: float
    diverged: float
    device: str
    devices: str
    jax: str
    driver: str
    python: str
    commit: str
    model: str
    config: str

    @property
    def key(self) -> Key:
        """Return what tells the row from all others."""
        return self.arm, self.text, self.seed, self.round

    @property
    def drafted(self) -> list[int]:
        """Return the drafts verified at each place of the arm's chain."""
        return [getattr(self, f"drafted_{i + 1}") for i in range(self.depth)]

    @property
    def accepted(self) -> list[int]:
        """Return the drafts committed from each place of the arm's chain."""
        return [getattr(self, f"accepted_{i + 1}") for i in range(self.depth)]

    @property
    def cycles(self) -> int:
        """Return the cycles of the run, those that the gate made plain among them."""
        return self.passes - self.decodes


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))
_TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": {"True": True, "False": False}.__getitem__,
    "tuple[float, ...]": lambda cell: tuple(map(float, cell.split())),
}
_READ = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(Run)}
SAME = ("config", "model", "device", "devices", "jax", "driver", "python", "commit")
"""Columns that are the same in all rows of a file."""


def read(path: Path) -> list[Run]:
    """Return the rows of a file; a part of a row at its end is left out.

    Raises:
      FileError: if it cannot be read, or holds something else, or a row twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    whole = content[: content.rfind(b"\n") + 1]
    lines = csv.reader(io.StringIO(whole.decode(errors="replace"), newline=""))
    header = next(lines, None)
    if header is not None and header != list(COLUMNS):
        raise FileError(f"{path}: expected the columns of an ablation, found others")
    rows: dict[Key, Run] = {}
    for number, cells in enumerate(lines, 2):
        try:
            named = zip(COLUMNS, cells, strict=True)
            run = Run(**{name: _READ[name](cell) for name, cell in named})
        except (ValueError, KeyError) as error:
            raise FileError(f"{path}: row {number} cannot be read: {error}") from error
        if run.key in rows:
            raise FileError(f"{path}: row {number} is there twice: {run.key}")
        rows[run.key] = run
    return list(rows.values())


def check_same(path: Path, rows: Sequence[Run], expected: Mapping[str, str]):
    """Compare what rows say of their origin, or a part of it, with what is expected.

    Raises:
      FileError: if it is another: times of both would not compare.
    """
    for name, value in expected.items():
        for run in rows[:1]:
            if getattr(run, name) != value:
                raise FileError(
                    f"{path}: holds runs of another {name}, {getattr(run, name)};"
                    f" expected {value}; name another --out"
                )


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Any]:
    """Yield a function that adds a Run to a file and returns when it is on the disk.

    Raises:
      FileError: if the file cannot be written.
    """
    try:
        with path.open("ab") as file:
            _cut(path)
            if not path.stat().st_size:
                _write(file, COLUMNS)
            yield lambda run: _write(file, [_cell(x) for x in dataclasses.astuple(run)])
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from error


def _cut(path: Path):
    """Cut off a part of a row at a file's end."""
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _write(file: io.BufferedWriter, cells: Sequence[Any]):
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(cells)
    file.write(line.getvalue().encode())
    file.flush()
    os.fsync(file.fileno())
