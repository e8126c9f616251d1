"""Write the report and figures of the checked-in ablation anew, and README's table.

Nothing is measured: the runs are those of
benchmarks/results/tiny_model/ablation/runs.csv, which

    ds4jax ablate --config=configs/ablation_depth.py \\
        --out=benchmarks/results/tiny_model/ablation

makes.  README's table stands between two comments that name this file.

Example:
    python benchmarks/figures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app

from ds4jax.experiments import runs_csv
from ds4jax.experiments.ablation_report import render
from ds4jax.experiments.figures import draw
from ds4jax.experiments.runs_csv import Run
from ds4jax.experiments.summary import summarise
from ds4jax.experiments.tables import interval, number, table
from ds4jax.files import replacing

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks/results/tiny_model/ablation"
BEGIN = "<!-- benchmarks/figures.py begins -->\n"
END = "<!-- benchmarks/figures.py ends -->\n"


def headline(runs: Sequence[Run]) -> str:
    """Return README's table: modes and depths, without the switches."""
    found = [
        one for one in summarise(runs)
        if not {"ds4-pairing", "unfilled", "gate"} & set(one.arm.split())
    ]  # fmt: skip
    texts = list(dict.fromkeys(one.text for one in found))
    by_arm = {one.arm: {} for one in found}
    for one in found:
        by_arm[one.arm][one.text] = one
    heads = ["arm"]
    for text in texts:
        heads += [f"{text}, tokens/s", "speed-up", "reads"]
    rows = []
    for arm, on in by_arm.items():
        row = [arm]
        for text in texts:
            one = on[text]
            reads = number(one.reads_per_token)
            row += [f"{one.rate.median:.1f}", interval(one.speedup, 2), reads]
        rows.append(row)
    return "\n".join(table(heads, rows)) + "\n"


def with_table(page: str, found: str) -> str:
    """Return a page whose table is `found`."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + found + END + after


def main(argv: Sequence[str]):
    """Write report.md, the figures and README."""
    del argv
    runs = runs_csv.read(FOLDER / "runs.csv")
    draw(runs, FOLDER)
    readme = ROOT / "README.md"
    for path, text in (
        (FOLDER / "report.md", render(runs)),
        (readme, with_table(readme.read_text(), headline(runs))),
    ):
        with replacing(path) as part:
            part.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    app.run(main)
