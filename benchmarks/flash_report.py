"""The report and the figure of Flash's passes and of replays, from their tables:

    python benchmarks/flash.py --context=2048,16384,65536 --ctx_alloc=66048 \\
        --out=benchmarks/results/flash/passes.csv
    ds4jax bench --synth=flash --plan=ds4-q2 --dtype=bfloat16 --noprefill \\
        --ctx_start=2048 --ctx_max=65536 --step_mul=8 --ctx_alloc=66048 \\
        --gen_tokens=192 --replay=0,0.25,0.5,0.7,0.9,1 \\
        --replay_modes=continuous,chained --csv=benchmarks/results/flash/replay.csv
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from ds4jax.experiments.figures import COLOURS
from ds4jax.experiments.replay_figure import speedups
from ds4jax.experiments.tables import table
from ds4jax.files import replacing

Row = Mapping[str, str]

ORIGIN = "device", "devices", "jax", "driver", "python", "commit"

WORDS = """\
What is real here: the shapes of DeepSeek-V4-Flash, the bytes of ds4's q2 layout, the
passes, and the time they take.  What is not: weights are random, made on the device,
and so is what they say.  The MTP head of random weights guesses nothing right; so the
text that plain decoding commits is replayed as drafts, right at a set rate and else the
head's own guess.  Passes of the head run and count, and the target verifies every
draft.  How many drafts the real weights accept is not measured.
"""
RANDOM = """\
Contexts were not read: states have random contents, and prefill is not in this table.
"""
PASSES = """\
`share` is the time in which a pass's weights can be read, over the time it takes; the
columns after it are where that goes, in milliseconds: launches that run beside each
other share the time equally, and what is missing is between launches.
"""
REPLAY = """\
a is the drafts accepted per cycle.  Predicted is (b + a) / (r + d), with b sure tokens
a cycle, 1 or chained 2; reads are target passes per token; `share` is what weights were
read, if routing is random, of what the memory could have read in the time.
"""
COSTS = """\
r is the time of a cycle's target passes and d of its drafts, in passes of one row.
"""


def render(passes: Sequence[Row], replay: Sequence[Row]) -> str:
    """Return the report in Markdown."""
    lines = ["# DeepSeek-V4-Flash with random weights", "", WORDS]
    lines += ["## Passes", "", *_origin(passes[0]), "", PASSES, *_passes(passes), ""]
    names = list(dict.fromkeys(row["model"] for row in replay))
    lines += ["## Replay", "", f"- model: {', '.join(names)}", *_origin(replay[0]), ""]
    if any(row["state"] == "random" for row in replay):
        lines += [RANDOM]
    lines += [REPLAY]
    limit = _limit(passes, replay)
    for context in _contexts(replay):
        here = [row for row in replay if row["ctx_tokens"] == context]
        lines += [f"### {int(context):,} tokens, room for {_tokens(here[0])}", ""]
        lines += [*_replays(here, limit), ""]
    same = sum(row["plains_tokens"] == "yes" for row in replay)
    peak = max(int(row["peak_bytes"] or 0) for row in replay)
    lines += [
        f"{same} of {len(replay)} runs committed plain decoding's tokens,"
        f" {replay[0]['gen_tokens']} each.  Peak memory {peak / 1e9:.1f} GB, copies of"
        " the state among it.",
        "",
    ]
    lines += ["## Cost model", "", COSTS, *_costs(replay), "", "![](flash.png)", ""]
    return "\n".join(lines)


def headline(passes: Sequence[Row], replay: Sequence[Row]) -> str:
    """Return README's table: continuous decoding of depth 1 at every context."""
    rates = list(dict.fromkeys(row["replay"] for row in replay if row["replay"]))
    limit = _limit(passes, replay)
    rows = []
    for context in _contexts(replay):
        here = [row for row in replay if row["ctx_tokens"] == context]
        plain = here[0]
        of = {row["replay"]: row for row in here if _mode(row) == "continuous 1"}
        cost = next(iter(of.values()))
        rows.append(
            [f"{int(context):,}", f"{float(plain['gen_tps']):.1f}"]
            + [f"{float(of[rate]['gen_tps']):.1f}" for rate in rates]
            + [f"{float(cost[name]):.2f}" for name in ("r", "d", "break_even")]
            + [_share(plain, limit)]
        )
    heads = [f"{replay[0]['model']}: context", "plain, tokens/s"]
    heads += [f"replay at {rate}" for rate in rates]
    heads += ["r", "d", "break-even", "plain's share of the memory's limit"]
    return "\n".join(table(heads, rows)) + "\n"


def draw(passes: Sequence[Row], replay: Sequence[Row], path: Path):
    """Write the figure: speed-ups at every context, and what a pass consists of."""
    contexts = _contexts(replay)
    figure = matplotlib.figure.Figure(
        (1.2 + 3.4 * len(contexts), 7.4), layout="constrained"
    )
    halves: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    above, below = halves
    axes = above.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for panel, context in zip(axes, contexts, strict=True):
        speedups(panel, [row for row in replay if row["ctx_tokens"] == context])
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed-up over plain decoding")
    axes[0].legend(frameon=False, title="line: cost model\npoint: replayed")
    above.suptitle(f"{replay[0]['model']}, {replay[0]['device']}", fontsize=10)
    _stack(below.subplots(), passes)
    with replacing(path) as part:
        figure.savefig(part, dpi=140)


def _stack(panel: Axes, passes: Sequence[Row]):
    """Draw the time of every pass as a bar of its groups of kernels."""
    names = [f"{int(row['context']):,}: {_pass(row)}" for row in passes]
    left = np.zeros(len(passes))
    for number, group in enumerate(_groups(passes)):
        width = np.array([float(row[f"us_{group}"]) / 1e3 for row in passes])
        panel.barh(
            names, width, left=left, label=group.replace("_", " "), height=0.7,
            color=COLOURS[number % 5], hatch=["", "///"][number // 5],
            edgecolor="white", lw=0,
        )  # fmt: skip
        left += width
    panel.invert_yaxis()
    panel.set_xlabel(f"milliseconds of launches, {passes[0]['layers']} layers")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")


def _passes(rows: Sequence[Row]) -> list[str]:
    groups = _groups(rows)
    heads = ["context", "pass", "layers", "ms", "share", "kernels"]
    heads += [group.replace("_", " ") for group in groups]
    return table(heads, [
        [
            f"{int(row['context']):,}", _pass(row), row["layers"],
            f"{float(row['ms']):.2f}", f"{float(row['share']):.0%}", row["kernels"],
            *(f"{float(row[f'us_{group}']) / 1e3:.2f}" for group in groups),
        ]
        for row in rows
    ])  # fmt: skip


def _replays(rows: Sequence[Row], limit: float) -> list[str]:
    heads = ["mode", "replay at", "accepted", "a", "tokens/s", "speed-up", "predicted"]
    heads += ["reads per token", "share"]
    return table(heads, [
        [
            _mode(row), row["replay"],
            f"{float(row['acceptance']):.0%}" if row["acceptance"] else "",
            _number(row["accepted_per_cycle"]), f"{float(row['gen_tps']):.1f}",
            _number(row["speedup"]), _number(row["predicted_speedup"]),
            row["shared_reads_per_token"], _share(row, limit),
        ]
        for row in rows
    ])  # fmt: skip


def _costs(rows: Sequence[Row]) -> list[str]:
    heads = ["context", "mode", "a pass of one row, ms", "r", "d", "break-even a"]
    found = {}
    for row in rows:
        if row["replay"]:
            costs = [_number(row[name]) for name in ("r", "d", "break_even")]
            found.setdefault(
                (f"{int(row['ctx_tokens']):,}", _mode(row)),
                [_number(row["one_row_ms"]), *costs],
            )
    return table(heads, [[*key, *costs] for key, costs in found.items()])


def _limit(passes: Sequence[Row], replay: Sequence[Row]) -> float:
    """Return the GB a second that the device reads; NaN if no pass says it."""
    device = replay[0]["device"]
    known = [row["read_tb_per_s"] for row in passes if row["device"] == device]
    return 1e3 * float(known[0]) if known else float("nan")


def _share(row: Row, limit: float) -> str:
    share = float(row["weight_gb_per_s"]) / limit
    return "" if np.isnan(share) else f"{share:.0%}"


def _origin(row: Row) -> list[str]:
    return [f"- {name}: {row[name]}" for name in ORIGIN]


def _contexts(replay: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["ctx_tokens"] for row in replay))


def _groups(passes: Sequence[Row]) -> list[str]:
    """Return the groups of kernels that take any time."""
    names = [name for name in passes[0] if name.startswith("us_")]
    return [
        name.removeprefix("us_") for name in names
        if any(float(row[name]) for row in passes)
    ]  # fmt: skip


def _pass(row: Row) -> str:
    rows = row["rows"]
    return rows if rows == "draft" else "1 row" if rows == "1" else f"{rows} rows"


def _mode(row: Row) -> str:
    return f"{row['mode']} {row['depth']}" if row["depth"] != "0" else row["mode"]


def _tokens(row: Row) -> str:
    return f"{int(row['ctx_alloc']):,}"


def _number(value: str) -> str:
    return f"{float(value):.2f}" if value else ""
