"""The figures of an ablation, as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D

from ds4jax.experiments.runs_csv import Run
from ds4jax.experiments.summary import Summary, summarise
from ds4jax.experiments.timing import Cost
from ds4jax.files import replacing

FIGURES = {
    "speedup.png": "Speed-up against drafts accepted per cycle",
    "acceptance.png": "Acceptance by place",
    "cycle.png": "Where the time of a cycle goes",
}
"""Names of the files, with what they show."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's, which the colour-blind can tell apart."""
MARKERS = "osD^"


def draw(runs: Sequence[Run], folder: Path):
    """Write the figures of FIGURES into a folder.

    Raises:
      FileError: if one cannot be written.
    """
    found = summarise(runs)
    drafting = [one for one in found if one.places]
    if not drafting:
        return
    drawn = _speedup(drafting), _acceptance(drafting), _cycle(found)
    for name, figure in zip(FIGURES, drawn, strict=True):
        with replacing(folder / name) as part:
            figure.savefig(part, dpi=140)


def _is_usual(one: Summary) -> bool:
    """Say whether an arm is a mode and a depth, with no switch changed."""
    return len(one.arm.split()) == 2


def _modes(found: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(one.runs[0].mode for one in found))


def _texts(found: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(one.text for one in found))


def panels(count: int, width: float, height: float):
    """Return a figure with panels side by side that share their axes."""
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speedup(drafting: Sequence[Summary]):
    """Draw measured speed-ups over accepted drafts, and the cost model's lines."""
    modes, texts = _modes(drafting), _texts(drafting)
    figure, axes = panels(len(modes), 1.5 + 4.6 * len(modes), 4.6)
    for panel, mode in zip(axes, modes, strict=True):
        here = [one for one in drafting if one.runs[0].mode == mode]
        for one in here:
            colour = COLOURS[one.runs[0].depth - 1]
            middle, low, high = one.speedup.median, one.speedup.low, one.speedup.high
            panel.errorbar(
                one.accepted_per_cycle, middle, [[middle - low], [high - middle]],
                fmt=MARKERS[texts.index(one.text) % 4], color=colour, capsize=2,
                mfc=colour if _is_usual(one) else "white", ms=6, lw=1,
            )  # fmt: skip
        for depth in sorted({one.runs[0].depth for one in here}):
            costs = [
                one.cost for one in here
                if one.runs[0].depth == depth and _is_usual(one)
            ]  # fmt: skip
            if not costs:
                continue
            cost = Cost(
                statistics.median(cost.r for cost in costs),
                statistics.median(cost.d for cost in costs),
                costs[0].base,
            )
            x = np.linspace(0, depth, 2)
            panel.plot(
                x, [cost.speedup(a) for a in x], color=COLOURS[depth - 1], lw=1.2,
                label=f"depth {depth}", zorder=1,
            )  # fmt: skip
        panel.axhline(1, color="0.4", lw=0.8, ls=":", zorder=0)
        panel.set_title(mode)
        panel.set_xlabel("drafts accepted per cycle")
    axes[0].set_ylabel("speed-up over the faster plain decoding")
    keys = [*axes[0].get_legend_handles_labels()[0]]
    keys += [
        Line2D([], [], ls="", marker=MARKERS[i % 4], color="0.3", label=text)
        for i, text in enumerate(texts)
    ]
    if not all(map(_is_usual, drafting)):
        keys.append(
            Line2D([], [], ls="", marker="o", mfc="white", color="0.3",
                   label="a switch changed")
        )  # fmt: skip
    figure.legend(
        handles=keys, loc="outside right upper", frameon=False,
        title="line: cost model\npoint: measured",
    )  # fmt: skip
    return figure


def _acceptance(drafting: Sequence[Summary]):
    """Draw the share accepted at each place of the chain."""
    texts = _texts(drafting)
    figure, axes = panels(len(texts), 1.8 + 3.1 * len(texts), 4.0)
    for panel, text in zip(axes, texts, strict=True):
        for one in (one for one in drafting if one.text == text):
            run = one.runs[0]
            if run.gate or run.verifier == "batched":
                continue
            colour = COLOURS[run.depth - 1] if _is_usual(one) else "0.45"
            marker = MARKERS[run.depth - 1] if _is_usual(one) else "x+"[run.fill]
            panel.plot(
                range(1, 1 + run.depth), [100 * share for share in one.places],
                color=colour, marker=marker, ms=5, lw=1.3, label=one.arm,
                ls="-" if run.mode == "continuous" else "--",
            )  # fmt: skip
        panel.set_title(text)
        panel.set_xlabel("place in the chain")
        panel.set_xticks(range(1, 1 + max(one.runs[0].depth for one in drafting)))
        panel.set_ylim(0, 103)
    axes[0].set_ylabel("drafts accepted, % of those verified")
    figure.legend(
        handles=axes[0].get_legend_handles_labels()[0],
        loc="outside right upper", frameon=False,
    )  # fmt: skip
    return figure


def _cycle(found: Sequence[Summary]):
    """Draw the time of a cycle as drafts, target passes and the rest."""
    arms = dict.fromkeys(one.arm for one in found if not one.runs[0].gate)
    parts = {"draft_ms": "draft", "target_ms": "verify (target passes)",
             "rest_ms": "rest"}  # fmt: skip
    figure = matplotlib.figure.Figure((8, 1.6 + 0.32 * len(arms)), layout="constrained")
    panel = figure.subplots()
    left = np.zeros(len(arms))
    for colour, (name, words) in zip(COLOURS, parts.items(), strict=False):
        width = np.array(
            [
                statistics.median(getattr(o, name) for o in found if o.arm == arm)
                for arm in arms
            ]
        )
        width = np.maximum(width, 0)
        panel.barh(range(len(arms)), width, left=left, color=colour, label=words,
                   height=0.7)  # fmt: skip
        left += width
    panel.set_yticks(range(len(arms)), list(arms))
    panel.invert_yaxis()
    panel.set_xlim(0, 1.03 * left.max())
    panel.set_xlabel("milliseconds per cycle, median of texts")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
