"""What README and the report show is what the runs kept in benchmarks/results say."""

import csv
import importlib
from pathlib import Path

from pytest import approx

from ds4jax.experiments import runs_csv
from ds4jax.experiments.ablation_report import render
from ds4jax.experiments.summary import check_gates, summarise
from ds4jax.experiments.tables import percents

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/tiny_model"
figures = importlib.import_module("figures")


def test_readmes_tables_and_the_report_are_of_the_runs():
    runs = runs_csv.read(figures.FOLDER / "runs.csv")
    page = (ROOT / "README.md").read_text()
    assert figures.with_tables(page, runs) == page
    assert render(runs) == (figures.FOLDER / "report.md").read_text()
    assert figures.headline(runs).count("\n") > 10


def test_flashs_report_is_of_its_tables():
    passes, replay = (figures.read(figures.FLASH / f"{name}.csv")
                      for name in ("passes", "replay"))  # fmt: skip
    report = figures.flash_report.render(passes, replay)
    assert report == (figures.FLASH / "report.md").read_text()
    assert (figures.FLASH / "flash.png").read_bytes().startswith(b"\x89PNG")
    assert {row["plains_tokens"] for row in replay} == {"yes"}
    for row in replay:
        if (row["mode"], row["depth"]) == ("continuous", "1"):
            a = float(row["replay"])
            # A last cycle that the budget cuts, and strata of whole drafts.
            assert abs(float(row["accepted_per_cycle"]) - a) < 0.03
            assert float(row["shared_reads_per_token"]) * (1 + a) == approx(1, rel=0.03)


def test_all_modes_commit_the_same_tokens_and_batched_ones_in_as_many_passes():
    rows = figures.read(figures.MODES)
    verified = {}
    for row in rows:
        alike = {name: row[name] for name in row if name != "verifier"}
        verified.setdefault(row["verifier"], []).append(alike)
    prompts = {row["prompt"] for row in rows}
    assert len({(row["prompt"], row["sha256"]) for row in rows}) == len(prompts) == 3
    speculative = [row for row in verified["exact"] if row["mode"] != "plain"]
    assert speculative == verified["batched"]


def test_the_figures_that_readme_shows_are_there():
    page = (ROOT / "README.md").read_text()
    shown = [line.split("](")[1].rstrip(")") for line in page.splitlines()
             if line.startswith("![")]  # fmt: skip
    assert len(shown) >= 2
    for path in shown:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")


def readme():
    return " ".join((ROOT / "README.md").read_text().split())


def span(times: list[float]) -> str:
    """Return from which number to which they are, or the only one."""
    least, most = (f"{time:.1f}" for time in (min(times), max(times)))
    return least if least == most else f"{least} to {most}"


def test_readme_says_what_an_exact_pass_costs():
    found = summarise(runs_csv.read(figures.FOLDER / "runs.csv"))
    plain = [one for one in found if one.arm == "plain"]
    pair = [one for one in found if one.arm == "continuous 1"]
    one, two, whole = (
        span(times)
        for times in (
            [one.cost.r for one in plain],
            [one.cost.r for one in pair],
            [1 / one.speedup.median for one in plain],
        )
    )
    assert (
        f"an exact pass of one row takes {one} passes of the one-row program there, "
        f"and one of two rows {two}; whole plain runs are {whole} times as long."
    ) in readme()


def test_readme_says_what_the_gate_costs():
    checks = check_gates(runs_csv.read(RESULTS / "gate/runs.csv"))
    assert len(checks) == 6
    for pairing, better in (("", "continuous 1"), ("ds4-pairing ", "plain")):
        arm = f"continuous 1 {pairing}gate"
        of_arm = [check for check in checks if check.arm == arm]
        assert {check.better for check in of_arm} == {better}
        said = ", ".join(f"{check.text} {percents(check.slower)}" for check in of_arm)
        assert said in readme()
    most = max(check.by_counters for check in checks)
    assert f"at most {most:.1%} slower than the better" in readme().replace(" %", "%")


def test_readme_says_what_the_peer_does():
    with (RESULTS / "peer.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    peer, plain, one, pair, deep = (
        f"{float(row['tokens_per_second']):.0f}" for row in rows
    )
    ratios = [f"{float(row['ratio']):.1f}" for row in rows]
    assert (
        f"medians of {rows[0]['rounds']} rounds: transformers {peer} tokens/s, plain "
        f"decoding {plain} ({ratios[1]} times as many), passes of one row {one} "
        f"({ratios[2]}), continuous decoding at depth 1 {pair} ({ratios[3]}), "
        f"at depth 4 {deep} ({ratios[4]})."
    ) in readme()
