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


def test_readmes_table_and_the_report_are_of_the_runs():
    runs = runs_csv.read(figures.FOLDER / "runs.csv")
    page = (ROOT / "README.md").read_text()
    assert figures.with_table(page, figures.headline(runs)) == page
    assert render(runs) == (figures.FOLDER / "report.md").read_text()
    assert figures.headline(runs).count("\n") > 10


def test_the_figures_that_readme_shows_are_there():
    page = (ROOT / "README.md").read_text()
    shown = [line.split("](")[1].rstrip(")") for line in page.splitlines()
             if line.startswith("![")]  # fmt: skip
    assert len(shown) >= 2
    for path in shown:
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")
