"""What README and the report show is what the runs kept in benchmarks/results say."""

import importlib.util
from pathlib import Path

from ds4jax.experiments import runs_csv
from ds4jax.experiments.ablation_report import render

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks/figures.py")
assert SPEC and SPEC.loader
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def test_readmes_tables_and_the_report_are_of_the_runs():
    runs = runs_csv.read(figures.FOLDER / "runs.csv")
    page = (ROOT / "README.md").read_text()
    assert figures.with_tables(page, runs) == page
    assert render(runs) == (figures.FOLDER / "report.md").read_text()
    assert figures.headline(runs).count("\n") > 10


def test_all_modes_commit_the_same_tokens_and_batched_ones_in_as_many_passes():
    rows = figures.read_modes()
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
