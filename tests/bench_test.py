"""`ds4jax bench`: what it measures and writes, and the sweep beneath it."""

import csv
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import jax
import models
import numpy as np
import pytest
import shipped

from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.modes import Decoding, Mode
from ds4jax.errors import CapacityError, ConfigError, TokenError
from ds4jax.experiments import context_sweep
from ds4jax.experiments.context_sweep import Way, frontiers, sweep

CHUNK = 16
CONTINUOUS = Decoding(mode=Mode("continuous", 1), prefill_chunk=CHUNK)
WAYS = [Way(CONTINUOUS)]
STOPS = [2 * CHUNK, 3 * CHUNK, 5 * CHUNK]
TOKENS = 9
CONTEXT = 256

DS4_COLUMNS = [
    "ctx_tokens", "prefill_tokens", "prefill_tps", "gen_tokens", "gen_tps",
    "kvcache_bytes",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return models.lively(models.slim_config())


def prompt(model, tokens=STOPS[-1]) -> list[int]:
    return models.text(model.config, tokens)[0].tolist()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((2, 9, 3, 1.0), [2, 5, 8, 9]),
        ((2, 8, 3, 1.0), [2, 5, 8]),
        ((4, 4, 3, 1.0), [4]),
        ((4, 5, 10, 1.0), [4, 5]),
        ((1, 9, 100, 2.0), [1, 2, 4, 8, 9]),
        ((3, 12, 100, 1.5), [3, 5, 8, 12]),
        ((1, 4, 100, 1.0001), [1, 2, 3, 4]),
    ],
)
def test_frontiers_are_ds4_benchs_and_end_at_the_last(asked, expected):
    assert frontiers(*asked) == expected


def test_a_sweep_decodes_what_a_fresh_run_decodes(model):
    text = prompt(model)
    points = list(sweep(model, text, STOPS, TOKENS, WAYS, CONTEXT))
    assert [point.context for point in points] == STOPS
    assert [point.read for point in points] == np.diff([0, *STOPS]).tolist()
    for point in points:
        carry = driver.create(model, CONTEXT, CONTINUOUS)
        carry = driver.prefill(model, carry, text[: point.context], CONTINUOUS)
        carry = carries.with_budget(carry, TOKENS)
        carry = driver.run(model, carry, CONTINUOUS)
        assert len(point.tokens) == TOKENS
        assert point.tokens == driver.committed(carry)[point.context :]
        counts = carry.statistics.of()
        assert point.passes == counts["passes"]
        assert sum(point.accepted) == counts["accepted"]
        assert sum(point.drafted) == counts["drafted"]
        assert point.prefill_seconds > 0 and point.decode_seconds > 0
        assert point.allocated == CONTEXT


def test_decoding_leaves_no_bit_behind(model, monkeypatch):
    """What a sweep reads on from is what it had read, in every leaf."""

    def on_host(carry):
        carry = dataclasses.replace(carry, rng=jax.random.key_data(carry.rng))
        return jax.tree.map(np.array, carry)

    real, seen = driver.prefill, []

    def prefill(model, carry, *words):
        given = on_host(carry)
        carry = real(model, carry, *words)
        seen.append((given, on_host(carry)))
        return carry

    monkeypatch.setattr(driver, "prefill", prefill)
    list(sweep(model, prompt(model), STOPS, TOKENS, WAYS, CONTEXT))
    *_, first, second, third = seen
    models.assert_same(second[0], first[1])
    models.assert_same(third[0], second[1])
    assert int(third[1].length[0]) == STOPS[-1]


def test_a_copy_outlives_the_carry(model):
    carry = driver.prefill(
        model, driver.create(model, CONTEXT, CONTINUOUS), [1, 2], CONTINUOUS
    )
    copy = carries.copy(carry)
    driver.run(model, carries.with_budget(carry, 3), CONTINUOUS)
    assert driver.committed(copy) == [1, 2]
    with pytest.raises(RuntimeError, match="deleted"):
        driver.committed(carry)


def test_nothing_is_compiled_while_the_clock_runs(model, monkeypatch):
    jax.clear_caches()
    running, compiled = [False], []

    def clock():
        running[0] = not running[0]
        return time.perf_counter()

    def listen(event: str, duration_secs: float, **_: str | int):
        if event.startswith("/jax/core/compile"):
            compiled.append(running[0])

    monkeypatch.setattr(context_sweep, "time", SimpleNamespace(perf_counter=clock))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        list(sweep(model, prompt(model), STOPS, TOKENS, WAYS, CONTEXT))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not running[0]
    assert compiled and not any(compiled)


def test_what_a_sweep_cannot_do_is_told_before_it_starts(model):
    text, how = prompt(model), WAYS
    with pytest.raises(TokenError, match="prompt: expected at least 80 tokens"):
        next(sweep(model, text[:-1], STOPS, TOKENS, how, CONTEXT))
    with pytest.raises(TokenError, match=r"prompt: expected ids in 0\.\.95"):
        next(sweep(model, [96, *text], STOPS, TOKENS, how, CONTEXT))
    with pytest.raises(CapacityError, match=r"room for 80 \+ 9 tokens, found 88"):
        next(sweep(model, text, STOPS, TOKENS, how, 88))
    trunk = dataclasses.replace(model, mtp={})
    with pytest.raises(ConfigError, match="expected one with an MTP head"):
        next(sweep(trunk, text, STOPS, TOKENS, how, CONTEXT))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    trunk, mtp = shipped.write_pair(tmp_path_factory.mktemp("pair"))
    return [f"--gguf={trunk}", f"--mtp={mtp}"]


@pytest.fixture(scope="module")
def command():
    with commands.command("bench") as command:
        yield command


@pytest.fixture
def bench(command, tmp_path):
    """Return a function that runs the command in `tmp_path`."""
    return functools.partial(command.run, tmp_path)


SMALL = "--ctx_start=10", "--step_incr=16", "--gen_tokens=5"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_a_row_for_each_context_and_a_figure(bench, files, tmp_path):
    status, out, err = bench(
        *files, *SMALL, "--ctx_max=30", "--csv=a.csv", "--figure=a.png"
    )
    assert status == 0, err
    rows = read(tmp_path / "a.csv")
    assert list(rows[0])[: len(DS4_COLUMNS)] == DS4_COLUMNS
    assert [row["ctx_tokens"] for row in rows] == ["10", "26", "30"]
    assert [row["prefill_tokens"] for row in rows] == ["10", "16", "4"]
    for row in rows:
        assert row["gen_tokens"] == "5" and len(row["sha256"]) == 64
        assert all(row[name][-3] == "." for name in ("prefill_tps", "gen_tps"))
        assert float(row["gen_tps"]) > 0 and int(row["kvcache_bytes"]) > 0
        assert (row["mode"], row["depth"], row["verifier"]) == (
            "continuous",
            "1",
            "exact",
        )
        assert row["shared_reads_per_token"] == f"{int(row['passes']) / 5:.3f}"
        assert row["accepted_at_1"] == row["acceptance"] and not row["accepted_at_2"]
        assert (row["model"], row["output_class"]) == ("trunk.gguf", "G")
        assert row["settings"] == "" and row["ctx_alloc"] == "256"
        assert row["device"] and row["jax"] and row["commit"]
    title, heading, *lines = out.splitlines()
    assert title.startswith("[continuous 1] trunk.gguf on ")
    assert heading.split()[: len(DS4_COLUMNS)] == DS4_COLUMNS
    shown = [line.split()[: len(DS4_COLUMNS)] for line in lines]
    assert shown == [[row[name] for name in DS4_COLUMNS] for row in rows]
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 500 and len(np.unique(pixels)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.png"]


def test_modes_decode_the_same_tokens_of_the_same_text(bench, files, tmp_path):
    """Of a text of one's own too, read as it is."""
    (tmp_path / "text.txt").write_text(shipped.TEXT)
    words = *files, *SMALL, "--ctx_max=26", "--csv=a.csv", "--prompt_file=text.txt"
    status, _, err = bench(*words)
    assert status == 0, err
    fast = read(tmp_path / "a.csv")
    status, out, err = bench(*words, "--mode=plain")
    assert status == 0, err
    plain = read(tmp_path / "a.csv")
    assert out.startswith("[plain] trunk.gguf")
    assert [row["sha256"] for row in fast] == [row["sha256"] for row in plain]
    assert {row["passes"] for row in plain} == {"5"}
    assert {row["acceptance"] for row in plain} == {""}
    assert int(plain[0]["kvcache_bytes"]) < int(fast[0]["kvcache_bytes"])


def test_synthetic_weights_need_no_file(bench, tmp_path):
    status, out, err = bench(
        "--synth=tiny", "--layers=1", "--plan=ds4-q4", "--mode=plain", "--ctx_start=5",
        "--ctx_max=10", "--step_mul=2", "--gen_tokens=3", "--csv=a.csv",
    )  # fmt: skip
    assert status == 0, err
    rows = read(tmp_path / "a.csv")
    assert [row["ctx_tokens"] for row in rows] == ["5", "10"]
    assert {row["model"] for row in rows} == {"synthetic tiny ds4-q4 1 layers"}


def test_a_replay_gives_a_row_for_every_rate(bench, files, tmp_path):
    status, out, err = bench(
        *files, "--ctx_start=10", "--ctx_max=10", "--gen_tokens=6",
        "--replay=0,1", "--replay_modes=continuous,chained:1",
        "--csv=a.csv", "--figure=a.png",
    )  # fmt: skip
    assert status == 0, err
    rows = read(tmp_path / "a.csv")
    assert list(rows[0])[: len(DS4_COLUMNS)] == DS4_COLUMNS
    found = [
        (row["mode"], row["depth"], row["replay"], row["shared_reads_per_token"],
         row["acceptance"], row["accepted_per_cycle"])
        for row in rows
    ]  # fmt: skip
    assert found == [
        ("plain", "0", "", "1.000", "", ""),
        ("continuous", "1", "0", "1.000", "0.000", "0.0000"),
        ("continuous", "1", "1", "0.500", "1.000", "1.0000"),
        ("chained", "1", "0", "1.000", "0.000", "0.0000"),
        ("chained", "1", "1", "0.667", "1.000", "1.0000"),
    ]
    assert len({row["sha256"] for row in rows}) == 1
    assert {row["plains_tokens"] for row in rows} == {"yes"}
    assert {row["state"] for row in rows} == {"read"}
    model_columns = "r", "d", "break_even", "predicted_speedup", "one_row_ms"
    plain, *replays = rows
    assert plain["speedup"] == "1.0000"
    assert not any(plain[name] for name in model_columns)
    for row in replays:
        base = 1 + (row["mode"] == "chained")
        r, d, break_even, predicted, _ = (float(row[name]) for name in model_columns)
        accepted = float(row["accepted_per_cycle"])
        assert predicted == pytest.approx((base + accepted) / (r + d), rel=1e-3)
        assert break_even == pytest.approx(r + d - base, abs=1e-3)
        speedup = float(row["gen_tps"]) / float(plain["gen_tps"])
        assert float(row["speedup"]) == pytest.approx(speedup, rel=0.01)
    rates = [float(row["weight_gb_per_s"]) * 6 / float(row["gen_tps"]) for row in rows]
    # Bytes in all: wrong drafts read more than right ones.
    assert rates[1] > rates[2] > 0 and rates[3] > rates[4] > 0
    title, heading, *lines = out.splitlines()
    assert title.startswith("[plain, continuous 1, chained 1; replay at 0, 1] trunk")
    assert len(lines) == len(rows)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_contexts_need_not_be_read(bench, tmp_path):
    status, out, err = bench(
        "--synth=tiny", "--layers=1", "--plan=ds4-q4", "--mode=plain", "--ctx_start=5",
        "--ctx_max=300", "--step_mul=60", "--gen_tokens=3", "--csv=a.csv",
        "--noprefill", "--figure=a.png",
    )  # fmt: skip
    assert status == 0, err
    rows = read(tmp_path / "a.csv")
    assert [row["ctx_tokens"] for row in rows] == ["5", "300"]
    assert [row["ctx_alloc"] for row in rows] == ["256", "512"]
    for row in rows:
        assert (row["prefill_tokens"], row["prefill_tps"]) == ("0", "")
        assert row["state"] == "random" and float(row["gen_tps"]) > 0
    assert (tmp_path / "a.png").exists()


def test_a_killed_sweep_leaves_whole_rows(files, tmp_path):
    table = tmp_path / "a.csv"
    words = *files, *SMALL, "--mode=plain", f"--csv={table}"
    words = *words, "--step_incr=1", "--ctx_max=250"
    with subprocess.Popen(
        [sys.executable, "-m", "ds4jax", "bench", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while process.poll() is None and (not table.exists() or len(read(table)) < 2):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.stderr and process.stderr.read() == ""
    rows = read(table)
    assert len(rows) >= 2 and table.read_text().endswith("\n")
    assert all(row[name] for row in rows for name in (*DS4_COLUMNS, "sha256", "commit"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ctx_start=9", "--ctx_max=8"], "--ctx_start=9: expected at most --ctx_max"),
        (["--step_mul=0.5"], "--step_mul=0.5: 0.5 is not number >= 1"),
        (["--step_mul=inf"], "--step_mul=inf: expected a finite number"),
        (["--gen_tokens=0"], "--gen_tokens=0: 0 is not a positive integer"),
        (["--ctx_alloc=32896"], "--ctx_alloc=32896: expected at least 32897"),
        (["--ctx_max=1048448"], "--ctx_max: expected a context of at most 1048576"),
        (["--ctx_alloc=1048577"], "--ctx_alloc: expected a context of at most 1048576"),
        (["--prompt_file=no.txt"], "no.txt: cannot be read as text"),
        (
            ["--prompt_file=/dev/null"],
            "--prompt_file=/dev/null: expected at least 32768",
        ),
        (["--csv=no/a.csv"], "no/a.csv: cannot be written"),
        (["--figure=no/a.png"], "no/a.png: cannot be written"),
        (["--layers=2"], "--layers: expected --synth with it"),
        (["--synth=tiny", "--gguf=t.gguf"], "--synth: expected no file with it"),
        (["--synth=tiny", "--layers=7"], "layers: expected 1..6, found 7"),
        (["--synth=tiny", "--prompt_file=a"], "--prompt_file: expected a model with a"),
        (["--mode=plain", "--depth=1"], "--depth: expected 0 when plain"),
        (["--noprefill"], "--noprefill: expected --synth with it"),
        (["--replay=0,1.5"], "--replay: expected rates in 0..1, found 1.5"),
        (["--replay=nan"], "--replay: expected rates in 0..1, found nan"),
        (["--replay=half"], "--replay: expected rates in 0..1, found half"),
        (["--replay="], "--replay: expected one rate or more, found none"),
        (["--replay=1", "--mode=plain"], "--replay: expected a mode that drafts"),
        (["--replay=1", "--prefill_chunk=1"], "--replay: expected a mode that drafts"),
        (["--replay=1", "--gate"], "--gate: expected no --replay with it"),
        (["--replay_modes=chained"], "--replay_modes: expected --replay with it"),
        (
            ["--replay=1", "--replay_modes=plain"],
            "--replay_modes: expected chained or continuous, with a :DEPTH or without,"
            " found plain",
        ),
        (
            ["--replay=1", "--replay_modes=chained:9"],
            "--replay_modes=chained:9: depth: expected 1..4 when chained, found 9",
        ),
        (
            ["--replay=1", "--replay_modes=chained", "--mtp_draft=2"],
            "--replay_modes and --mtp_draft: expected one of them",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(bench, tmp_path, words, message):
    status, out, err = bench(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_ds4s_logs_are_refused(bench, command):
    command.environment = {"DS4_MTP_TIMING": "1", "DS4_MTP_CONTINUOUS": "1"}
    status, out, err = bench("--mtp_draft=2")
    command.environment = {}
    assert (status, out) == (2, "")
    assert "expected no log of cycles" in err


def test_a_figure_needs_matplotlib(tmp_path):
    """Where it is missing that is told before anything is measured."""
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from ds4jax import cli; sys.exit(cli.main(['bench', '--figure=a.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    message = "ds4jax bench: --figure: needs matplotlib: pip install 'ds4jax[plot]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
