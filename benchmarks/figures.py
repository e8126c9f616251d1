"""Write the reports and figures of checked-in measurements anew, and README's tables.

Nothing is measured: the runs are those of
benchmarks/results/tiny_model/ablation/runs.csv, which

    ds4jax ablate --config=configs/ablation_depth.py \\
        --out=benchmarks/results/tiny_model/ablation

makes, of modes.csv beside that folder, which benchmarks/modes.py makes, and of the
tables that benchmarks/flash_report.py names.  Each of README's tables stands between
two comments that name this file.

Example:
    python benchmarks/figures.py
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import flash_report
from absl import app

from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.experiments import runs_csv
from ds4jax.experiments.ablation_report import render
from ds4jax.experiments.figures import draw
from ds4jax.experiments.runs_csv import Run
from ds4jax.experiments.summary import summarise
from ds4jax.experiments.tables import interval, number, table
from ds4jax.files import replacing

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks/results/tiny_model/ablation"
MODES = FOLDER.parent / "modes.csv"
FLASH = ROOT / "benchmarks/results/flash"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def modes(rows: Sequence[Mapping[str, str]]) -> str:
    """Return README's table of modes, verified exactly: passes, and what is accepted.

    The last columns are of the first prompt and of the last.
    """
    by_mode: dict[tuple[str, str], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        if row["verifier"] == "exact":
            on = by_mode.setdefault((row["mode"], row["depth"]), {})
            on[row["prompt"]] = row
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    ends = prompts[0], prompts[-1]
    heads = ["mode", "depth", *prompts, *(f"accepted, {prompt}" for prompt in ends)]
    found = []
    for names, on in by_mode.items():
        passes = [on[prompt]["shared_reads_per_token"] for prompt in prompts]
        found.append([*names, *passes, *(_places(on[prompt]) for prompt in ends)])
    return "\n".join(table(heads, found)) + "\n"


def _places(row: Mapping[str, str]) -> str:
    """Return the share accepted of the drafts at each place."""
    shares = (row[f"accepted_at_{place}"] for place in range(1, MAX_DEPTH + 1))
    return ", ".join(f"{float(share):.0%}" for share in shares if share)


def headline(runs: Sequence[Run]) -> str:
    """Return README's table of arms: modes and depths, without the switches."""
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


def with_tables(page: str, runs: Sequence[Run]) -> str:
    """Return README with the tables of these runs, of modes.csv and of Flash's."""
    replay = flash_report.headline(*_flash())
    for name, found in (
        ("modes", modes(read(MODES))), ("ablation", headline(runs)), ("replay", replay)
    ):  # fmt: skip
        begin, end = (
            f"<!-- benchmarks/figures.py: {name} {what} -->\n"
            for what in ("begins", "ends")
        )
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = before + begin + found + end + after
    return page


def _flash() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return read(FLASH / "passes.csv"), read(FLASH / "replay.csv")


def main(argv: Sequence[str]):
    """Write the reports, the figures and README."""
    del argv
    runs = runs_csv.read(FOLDER / "runs.csv")
    draw(runs, FOLDER)
    flash_report.draw(*_flash(), FLASH / "flash.png")
    readme = ROOT / "README.md"
    for path, text in (
        (FOLDER / "report.md", render(runs)),
        (FLASH / "report.md", flash_report.render(*_flash())),
        (readme, with_tables(readme.read_text(), runs)),
    ):
        with replacing(path) as part:
            part.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    app.run(main)
