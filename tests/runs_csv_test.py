"""runs.csv: what is read is what was written, after any interruption."""

import dataclasses
import math

import ablations
import pytest

from ds4jax.errors import FileError
from ds4jax.experiments import runs_csv
from ds4jax.experiments.runs_csv import appending, check_same, read

RUNS = ablations.runs()[:3]


def write(path, runs):
    with appending(path) as append:
        for run in runs:
            append(run)


def test_rows_come_back_as_they_were(tmp_path):
    odd = dataclasses.replace(
        RUNS[0],
        seconds=1 / 3,
        turns=(0.1, 7e-7 / 3),
        device='a "CPU", 2 cores',
        worst_gap=math.inf,
    )
    write(tmp_path / "runs.csv", [odd, *RUNS[1:]])
    assert read(tmp_path / "runs.csv") == [odd, *RUNS[1:]]


def test_a_file_cut_anywhere_goes_on(tmp_path):
    """At every length that a kill could leave; seen red with the torn part kept."""
    path = tmp_path / "runs.csv"
    write(path, RUNS)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 1 + len(RUNS)
    for length in (0, 1, *ends, *(e - 1 for e in ends), *range(5, len(whole), 97)):
        path.write_bytes(whole[:length])
        done = read(path)
        assert done == RUNS[: max(0, sum(end <= length for end in ends) - 1)]
        write(path, RUNS[len(done) :])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", runs_csv.SAME)
def test_another_origin_is_refused(tmp_path, name):
    origin = ablations.ORIGIN | {name: "other"}
    message = f"holds runs of another {name}, .*; expected other; name another --out"
    with pytest.raises(FileError, match=message):
        check_same(tmp_path / "runs.csv", RUNS, origin)
    check_same(tmp_path / "runs.csv", RUNS, ablations.ORIGIN)
    check_same(tmp_path / "runs.csv", [], origin)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda lines: [*lines, lines[1]], "row 5 is there twice: .'plain', 'copy', 0"),
        (
            lambda lines: [lines[0], f"1,{lines[1]}"],
            "row 2 cannot be read",
        ),
        (lambda lines: [lines[0], "1,2\n"], "row 2 cannot be read"),
        (lambda lines: ["a,b\n"], "expected the columns of an ablation, found others"),
    ],
)
def test_a_spoilt_file_is_told(tmp_path, spoil, message):
    path = tmp_path / "runs.csv"
    write(path, RUNS)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(spoil(lines)))
    with pytest.raises(FileError, match=message):
        read(path)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with (
        pytest.raises(FileError, match="cannot be written: No such file"),
        appending(tmp_path / "no" / "runs.csv"),
    ):
        pass
