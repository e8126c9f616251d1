"""The figure of a sweep: speeds of decoding and of reading against the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

SPEEDS = {"gen_tps": ("decoding", "#c1440e"), "prefill_tps": ("reading", "#1f5a92")}
"""The columns that are drawn if they are filled, each with the name and the colour of
its panel."""


def draw(rows: Sequence[Mapping[str, str]], path: Path):
    """Write the figure of a sweep's rows as a PNG.

    Args:
      rows: as `ds4jax bench --csv` writes them, one or more, of one way of decoding.
      path: where to.
    """
    first, contexts = rows[0], [int(row["ctx_tokens"]) for row in rows]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    shown = {column: look for column, look in SPEEDS.items() if first[column]}
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (column, (name, colour)) in zip(panels, shown.items(), strict=True):
        speeds = [float(row[column]) for row in rows]
        axes.plot(contexts, speeds, "o-", color=colour, markersize=5, linewidth=1.6)
        axes.set_ylabel(f"{name}, tokens/s")
        axes.set_ylim(0, 1.15 * max(speeds))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("context, tokens")
    panels[-1].set_xlim(0, 1.03 * contexts[-1])
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    way = " ".join([first["mode"], *[first["depth"]] * (first["depth"] != "0")])
    panels[0].set_title(
        f"{first['model']}: {way}, {first['verifier']}", loc="left", pad=20
    )
    panels[0].text(
        0, 1.03,
        f"{first['device']}; jax {first['jax']}; commit {first['commit']};"
        f" {first['gen_tokens']} tokens decoded at each context",
        transform=panels[0].transAxes, fontsize=8, color="0.35",
    )  # fmt: skip
    figure.savefig(path, dpi=140, format="png")
