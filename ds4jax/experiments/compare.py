"""Compare two ablations: the same runs on two commits, devices or versions of JAX.

Runs are matched by arm, text, seed and round.  The two were not made in turns, so an
interval holds what varies within a file, but not what differs between the machines'
states; measure both twice before you believe a few percent.

Example:
    ds4jax compare runs/before/runs.csv runs/after/runs.csv
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ds4jax.errors import FileError
from ds4jax.experiments import runs_csv
from ds4jax.experiments.runs_csv import SAME, Run
from ds4jax.experiments.summary import counted
from ds4jax.experiments.tables import percents, table
from ds4jax.experiments.timing import estimate

ARGUMENTS = ("A.csv", "B.csv")


def main(argv: Sequence[str]):
    """Print how the second file's runs differ from the first's.

    Raises:
      FileError: if a file cannot be read, or no run is in both.
    """
    before, after = (Path(word) for word in argv[1:])
    print(render(before, after))


def render(before: Path, after: Path) -> str:
    """Return the comparison of two files, in Markdown.

    Raises:
      FileError: as `main`.
    """
    first, second = runs_csv.read(before), runs_csv.read(after)
    pairs = match(first, second)
    if not pairs:
        raise FileError(
            f"{before} and {after}: expected runs of one arm, text, seed, round and"
            f" number of tokens, found none among {len(first)} and {len(second)}"
        )
    lines = [
        f"{len(pairs)} runs matched, of {len(counted(first))} and"
        f" {len(counted(second))} that count.",
        "",
        *_origins(pairs[0]),
    ]
    groups: dict[tuple[str, str], list[tuple[Run, Run]]] = {}
    for a, b in pairs:
        groups.setdefault((a.arm, a.text), []).append((a, b))
    rows = []
    for (arm, text), group in groups.items():
        change = estimate([b.tokens_per_second / a.tokens_per_second - 1
                           for a, b in group])  # fmt: skip
        passes = sum(b.passes - a.passes for a, b in group)
        same = all(a.sha256 == b.sha256 for a, b in group)
        rates = [estimate([run.tokens_per_second for run in runs]).median
                 for runs in zip(*group, strict=True)]  # fmt: skip
        rows.append(
            (arm, text, *(f"{rate:.1f}" for rate in rates), percents(change),
             f"{passes:+d}", str(len(group)), "same" if same else "OTHERS")
        )  # fmt: skip
    heads = ("arm", "text", "A, tokens/s", "B, tokens/s", "B against A",
             "target passes", "runs", "tokens")  # fmt: skip
    return "\n".join([*lines, *table(heads, rows)])


def match(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return the pairs of runs of one key and number of tokens, round 0 left out."""
    others = {(run.key, run.tokens): run for run in counted(second)}
    keys = [(run.key, run.tokens) for run in counted(first)]
    found = zip(counted(first), keys, strict=True)
    return [(run, others[key]) for run, key in found if key in others]


def _origins(pair: tuple[Run, Run]) -> list[str]:
    """Say what is different about where the two were made."""
    a, b = pair
    lines = [
        f"- {name}: {getattr(a, name)}, then {getattr(b, name)}"
        for name in SAME
        if name != "config" and getattr(a, name) != getattr(b, name)
    ]
    old, new = json.loads(a.config), json.loads(b.config)
    lines += [
        f"- config.{name}: {old.get(name)}, then {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return [*lines, ""] if lines else []
