"""`ds4jax ablate`: what it leaves in its folder, also after it was killed."""

import collections
import csv
import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import shipped

from ds4jax import gguf
from ds4jax.experiments import runs_csv
from ds4jax.experiments.arm_runs import Bench
from ds4jax.experiments.arms import ONE_ROW, PLAIN, Arm, Settings, arms
from ds4jax.experiments.figures import FIGURES
from ds4jax.model import deepseek

CONFIG = """
def get_config():
    from ml_collections import ConfigDict
    return ConfigDict(dict(
        modes=("continuous",), depths=(0, 1), texts=("copy",), tokens=12,
        turn=5, rounds=12, repeats=1, gates=(False,), verifiers=("exact",), seeds=(0,),
    ))
"""
ARMS = ("plain", "plain one-row", "continuous 1")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return the flags of a small model and a config of 39 runs."""
    folder = tmp_path_factory.mktemp("pair")
    trunk, mtp = shipped.write_pair(folder)
    (folder / "config.py").write_text(CONFIG)
    return [f"--gguf={trunk}", f"--mtp={mtp}", f"--config={folder / 'config.py'}"]


@pytest.fixture(scope="module")
def command():
    with commands.command("ablate") as command:
        yield command


@pytest.fixture
def ablate(command, tmp_path):
    """Return a function that runs the command in `tmp_path`."""
    return functools.partial(command.run, tmp_path)


def wait_for_rows(process, path, rows):
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > rows:
            return
        time.sleep(0.002)
    raise AssertionError(f"ended with {process.returncode} before {rows} rows")


def go_on(ablate, words, table) -> list[dict]:
    """Return the rows of a killed run that was left to finish.

    What a kill could leave half written is added by hand.
    """
    report = table.parent / "report.md"
    assert not report.exists()
    before = table.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert 14 <= whole.count(b"\n") - 1 < 39
    with table.open("ab") as file:
        file.write(b"plain,copy,0,7,plai")
    status, out, err = ablate(*words, "--out=out")
    assert status == 0, err
    assert out == "out/report.md: 39 runs of 3 arms\n"
    assert table.read_bytes().startswith(whole) and report.exists()
    with table.open() as file:
        rows = list(csv.DictReader(file))
    keys = collections.Counter((row["arm"], row["round"]) for row in rows)
    assert keys == {(arm, str(n)): 1 for arm in ARMS for n in range(13)}
    return rows


def test_a_killed_run_goes_on_where_it_stopped(ablate, words, tmp_path):
    """Killed, then left to finish: every row once, the early ones untouched."""
    table = tmp_path / "out" / "runs.csv"
    line = [sys.executable, "-m", "ds4jax", "ablate", *words, f"--out={table.parent}"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        wait_for_rows(process, table, 14)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    go_on(ablate, words, table)
    # Killed again, as it went on: all that is left are the rows so far.
    table.write_bytes(b"".join(table.read_bytes().splitlines(keepends=True)[:26]))
    (tmp_path / "out/report.md").unlink()
    rows = go_on(ablate, words, table)
    assert {row["tokens"] for row in rows} == {"12"}
    assert len({row["sha256"] for row in rows if row["arm"] != ARMS[1]}) == 1
    assert {row["worst_gap"] for row in rows if row["arm"] != ARMS[1]} == {"0.0"}

    # Done, it only writes the report and the figures anew, without a model's work, and
    # whatever commit measured; short of a row, it wants that commit's.
    commit, other = rows[0]["commit"], "f" * len(rows[0]["commit"])
    table.write_text(table.read_text().replace(commit, other))
    done, report = table.read_bytes(), (tmp_path / "out/report.md").read_text()
    (tmp_path / "out/report.md").unlink()
    status, _, err = ablate(*words, "--out=out")
    assert status == 0, err
    assert table.read_bytes() == done
    found = (tmp_path / "out/report.md").read_text()
    assert found == report.replace(commit, other)
    table.write_bytes(done[: done.rfind(b"\n", 0, -1) + 1])
    status, out, err = ablate(*words, "--out=out")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"holds runs of another commit, {other}" in err
    table.write_bytes(done)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"runs.csv", "report.md", *FIGURES}
    for arm in ARMS:
        assert f"| {arm} | " in report
    # It refuses another config, in one line, touching nothing.
    status, out, err = ablate(*words, "--out=out", "--config.tokens=13")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "out/runs.csv: holds runs of another config," in err
    assert "name another --out" in err and table.read_bytes() == done


def test_the_arm_that_is_behind_has_the_next_turn_and_turns_change_nothing(
    words, monkeypatch
):
    """In turns of two cycles each arm counts what it does when left to run.

    Seen red where the first arm goes on, and where a turn takes more.
    """
    trunk_path, mtp_path = (Path(word.split("=")[1]) for word in words[:2])
    config, trunk = gguf.load_trunk(trunk_path)
    model = deepseek.build(config, trunk, gguf.load_mtp(mtp_path, config))
    prompts = {("copy", 0): range(20)}
    every = [PLAIN, ONE_ROW, Arm("continuous", 1)]
    of_time = {"seconds", "turns", "tokens_per_second", "target_ms", "draft_ms"}
    found = {}
    for turn in (2, 100):
        bench = Bench(model, Settings(tokens=11, turn=turn, repeats=1), prompts)
        decode, had = bench._decode, []

        def recorded(arm, carry, decode=decode, had=had):
            had.append((arm, int(carry.length[0])))
            return decode(arm, carry)

        monkeypatch.setattr(bench, "_decode", recorded)
        rows = bench.run(every, ("copy", 0), 1)
        found[turn] = [
            {name: row[name] for name in row.keys() - of_time} for row in rows
        ]
        lengths = [length for _, length in had]
        assert lengths == sorted(lengths)
        if turn == 100:
            assert [arm for arm, _ in had] == every
        else:
            turns = collections.Counter(arm for arm, _ in had)
            assert turns[PLAIN] == turns[ONE_ROW] == 6
            assert all(3 <= turns[arm] <= 6 for arm in every)
        for row in rows:
            assert row["seconds"] == sum(row["turns"]) and min(row["turns"]) > 0
    assert found[2] == found[100]


def test_fields_of_the_config_are_flags(ablate, words, tmp_path):
    """Texts and seeds multiply the runs; a seed starts from a part of the text."""
    status, out, err = ablate(
        *words, "--out=out", "--config.depths=0", "--config.texts=copy,prose",
        "--config.seeds=0,5", "--config.rounds=1",
    )  # fmt: skip
    assert status == 0, err
    assert out == "out/report.md: 16 runs of 2 arms\n"
    runs = runs_csv.read(tmp_path / "out/runs.csv")
    plain = [run for run in runs if run.arm == "plain"]
    assert len({(run.text, run.seed, run.sha256) for run in plain}) == 4
    assert len({run.sha256 for run in plain}) > 2
    assert "Nothing drafts." in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--config.depths=0,5"], "--config.depths: expected some of: 0 1 2 3 4, fou"),
        (["--config.depths=1,1"], "--config.depths: expected each once, found (1, 1)"),
        (["--config.texts=copy,poem"], "--config.texts: expected some of: copy techn"),
        (["--config.modes=eager"], "--config.modes: expected some of: continuous cha"),
        (["--config.rounds=0"], "--config.rounds: expected at least 1, found 0"),
        (["--config.turn=0"], "--config.turn: expected at least 1, found 0"),
        (["--config.rounds=x"], "--config.rounds=x: invalid literal for int"),
        (["--config.seeds=-1"], "--config.seeds: expected some of 0, 1, .."),
        (["--config.round=3"], 'Did you mean "rounds" instead of "round"?'),
        (["--config=none.py"], "none.py"),
        (["--config=broken.py"], "--config: ZeroDivisionError: division by zero"),
        (["--config=odd.py"], "--config.colour: expected a field of: modes depths"),
        (["--config=hot.py"], "--config.temperature: expected 0, or a finite number"),
        (["--config=eager.py"], "--config.gate_least: expected at least 0, found -1.0"),
        (["--config=many.py"], "--config.gate_least: expected one, or one for each of"),
        (["--out=/dev/null/x"], "--out=/dev/null/x: Not a directory"),
        (["--gguf=none.gguf"], "none.gguf"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    ablate, words, tmp_path, more, message
):
    configs = {
        "broken": "1 / 0",
        "odd": "dict(colour=1)",
        "hot": "dict(temperature=-1.)",
        "eager": "dict(gate_least=-1.)",
        "many": "dict(gate_least=(0.3, 0.6))",
    }
    for name, value in configs.items():
        (tmp_path / f"{name}.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({value})\n"
        )
    status, out, err = ablate(*words, "--out=out", *more)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert not (tmp_path / "out" / "runs.csv").exists()


def test_what_it_needs_is_told(ablate, words):
    for given, message in (
        (words[2:], "missing --out"),
        ([*words[:2], "--out=out"], "missing --config"),
        ([words[0], words[2], "--out=out"], "--mtp: expected an MTP file"),
    ):
        status, out, err = ablate(*given)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_the_configs_that_ship_are_good():
    import importlib.util

    folder = Path(__file__).parent.parent / "configs"
    names = sorted(folder.glob("ablation_*.py"))
    known = ["ablation_depth", "ablation_gate", "ablation_smoke"]
    assert [path.stem for path in names] == known
    for path in names:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert len(arms(Settings.of(module.get_config().to_dict()))) > 2
