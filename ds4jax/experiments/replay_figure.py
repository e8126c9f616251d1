"""The figure of a replay: what speculation gains, against the drafts accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ds4jax.experiments.figures import COLOURS, MARKERS, panels
from ds4jax.experiments.timing import Cost

Row = Mapping[str, str]
"""Of `ds4jax bench --replay --csv`."""


def draw(rows: Sequence[Row], path: Path):
    """Write a figure with a panel for each context as a PNG."""
    contexts = list(dict.fromkeys(row["ctx_tokens"] for row in rows))
    figure, axes = panels(len(contexts), 1.2 + 3.4 * len(contexts), 4.2)
    for panel, context in zip(axes, contexts, strict=True):
        speedups(panel, [row for row in rows if row["ctx_tokens"] == context])
    axes[0].set_ylabel("speed-up over plain decoding")
    axes[0].legend(frameon=False, title="line: cost model, point: replayed")
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['device']}, jax {first['jax']},"
        f" commit {first['commit']}",
        fontsize=8, color="0.35",
    )  # fmt: skip
    figure.savefig(path, dpi=140, format="png")


def speedups(panel: Axes, rows: Sequence[Row]):
    """Draw what the replays of one context gained, and the cost model's lines."""
    replays = [row for row in rows if row["replay"]]
    modes = list(dict.fromkeys((row["mode"], row["depth"]) for row in replays))
    for number, (mode, depth) in enumerate(modes):
        of = [row for row in replays if (row["mode"], row["depth"]) == (mode, depth)]
        colour = COLOURS[number % 5]
        panel.plot(
            [float(row["accepted_per_cycle"]) for row in of],
            [float(row["speedup"]) for row in of],
            MARKERS[number % 4], ms=5, label=f"{mode} {depth}", color=colour,
        )  # fmt: skip
        base = 2.0 if mode == "chained" else 1.0
        cost = Cost(float(of[0]["r"]), float(of[0]["d"]), base)
        x = np.linspace(0, int(depth), 2)
        panel.plot(x, [cost.speedup(a) for a in x], lw=1.2, zorder=1, color=colour)
    panel.axhline(1, color="0.4", lw=0.8, ls=":", zorder=0)
    panel.set_title(f"{int(rows[0]['ctx_tokens']):,} tokens")
    panel.set_xlabel("drafts accepted per cycle")
