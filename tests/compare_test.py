"""`ds4jax compare`: two files of runs, matched run by run."""

import dataclasses

import ablations
import commands
import pytest

from ds4jax.experiments.runs_csv import Run, appending


@pytest.fixture(scope="module")
def command():
    with commands.command("compare") as command:
        yield command


def write(path, runs: list[Run]):
    with appending(path) as append:
        for run in runs:
            append(run)


def faster(run: Run, factor: float) -> Run:
    """Return the run `factor` times as fast, on another commit."""
    return dataclasses.replace(
        run, commit="ba9876543210", seconds=run.seconds / factor,
        tokens_per_second=run.tokens_per_second * factor,
    )  # fmt: skip


def test_what_is_faster_is_told_with_its_interval(command, tmp_path):
    runs = ablations.runs()
    write(tmp_path / "a.csv", runs)
    write(tmp_path / "b.csv", [faster(run, 1.25) for run in runs[::-1]])
    status, out, err = command.run(tmp_path, "a.csv", "b.csv")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "96 runs matched, of 96 and 96 that count."
    assert lines[2] == "- commit: 0123456789ab, then ba9876543210"
    rows = [line for line in lines if "+25.0% [+25.0%, +25.0%]" in line]
    assert len(rows) == 8 * 2 and all(row.endswith("| +0 | 6 | same |") for row in rows)


def test_other_tokens_and_settings_are_told(command, tmp_path):
    runs = ablations.runs()
    other = dataclasses.replace(ablations.SETTINGS, repeats=7).to_json()
    change = dict(config=other, sha256="f" * 64, passes=7)
    write(tmp_path / "a.csv", runs)
    write(tmp_path / "b.csv", [dataclasses.replace(run, **change) for run in runs])
    status, out, err = command.run(tmp_path, "a.csv", "b.csv")
    assert status == 0, err
    assert "- config.repeats: 10, then 7" in out
    assert out.count("OTHERS") == 16


def test_only_the_same_run_matches(command, tmp_path):
    write(tmp_path / "a.csv", [r for r in ablations.runs() if r.text == "copy"])
    write(tmp_path / "b.csv", [r for r in ablations.runs() if r.text == "prose"])
    status, out, err = command.run(tmp_path, "a.csv", "b.csv")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "expected runs of one arm, text, seed, round and number of tokens" in err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "b.csv: cannot be read: No such file"),
        ("step,loss\n1,2\n", "b.csv: expected the columns of an ablation"),
        ("", "expected runs of one arm"),
    ],
)
def test_a_file_that_is_none_is_told(command, tmp_path, content, message):
    write(tmp_path / "a.csv", ablations.runs())
    if content is not None:
        (tmp_path / "b.csv").write_text(content)
    status, out, err = command.run(tmp_path, "a.csv", "b.csv")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_two_files_are_needed(command, tmp_path):
    status, _, err = command.run(tmp_path, "a.csv")
    assert (status, err.count("\n")) == (2, 1) and "missing B.csv" in err
