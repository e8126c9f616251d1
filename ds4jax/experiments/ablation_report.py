"""report.md: what an ablation found, in tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from ds4jax.experiments.figures import FIGURES
from ds4jax.experiments.runs_csv import SAME, Run
from ds4jax.experiments.summary import (
    GATE_TOLERANCE,
    Summary,
    check_gates,
    counted,
    faster_plain,
    summarise,
)
from ds4jax.experiments.tables import interval, number, percents, table

WORDS = """\
Every number is of the runs after the first round, over all seeds.  Times are of whole
runs on the device, all turns of each, compilation and prefill left out.  A bracket is a
bootstrap 95 % interval of the median, a parenthesis the least and the most.  Speed-ups
are paired: a run against that of plain decoding of the same text, seed and round.
Plain decoding is measured in the exact class and by passes of one row; the faster one
is what counts.
"""
MODEL = """\
r is the time of a cycle's target passes and d of its drafts, in passes of the faster
plain decoding; a is the number of drafts accepted per cycle, and alpha the share
accepted of those verified, at any place.  A cycle has b sure tokens: 1, or 2 if it is
chained.  Predicted is (b + a) / (r + d), at depth 1 of `continuous` the
(1 + alpha) / (r + d) of ds4; it is 1 at the break-even a, r + d - b.  With the gate,
r, d and b are means over cycles that draft and cycles that do not.  Rest is what a
cycle takes beside its passes when those are measured alone.
"""


def render(runs: Sequence[Run]) -> str:
    """Return the report of an ablation's runs."""
    found = summarise(runs)
    first = runs[0]
    lines = ["# Ablation", ""]
    lines += [f"- {name}: {getattr(first, name)}" for name in SAME if name != "config"]
    lines += [f"- {name}: {value}" for name, value in json.loads(first.config).items()]
    lines += ["", WORDS, "## Speed", ""]
    for text in dict.fromkeys(one.text for one in found):
        here = [one for one in found if one.text == text]
        reference = faster_plain([r for r in counted(runs) if r.text == text])
        lines += [f"### {text}", "", f"Speed-ups are over {reference}.", ""]
        lines += [*_speed(here), ""]
    lines += ["## Cost model", "", MODEL, *_costs(found), ""]
    lines += ["## Acceptance by place", "", *_places(found), ""]
    lines += ["## Tokens", "", *_tokens(found), ""]
    lines += ["## Gate", "", *_gate(runs), "", "## Figures", ""]
    lines += [f"![{words}]({name})\n" for name, words in FIGURES.items()]
    return "\n".join(lines)


def _speed(found: Sequence[Summary]) -> list[str]:
    heads = (
        "arm", "tokens/s", "speed-up", "predicted", "shared reads per token",
        "target passes", "cold cycles", "tokens",
    )  # fmt: skip
    rows = [
        (
            one.arm,
            f"{one.rate.median:.1f} ({one.rate.least:.1f}-{one.rate.most:.1f})",
            interval(one.speedup),
            number(one.predicted, 3),
            number(one.reads_per_token, 3),
            str(one.total("passes")),
            str(one.total("cold_cycles")),
            "plain's" if one.same else "others",
        )
        for one in found
    ]
    return table(heads, rows)


def _costs(found: Sequence[Summary]) -> list[str]:
    heads = (
        "arm", "text", "target ms", "draft ms", "rest ms", "r", "d", "a", "alpha",
        "break-even a", "predicted", "measured",
    )  # fmt: skip
    rows = [
        (
            one.arm, one.text, number(one.target_ms), number(one.draft_ms),
            number(one.rest_ms), number(one.cost.r), number(one.cost.d),
            number(one.accepted_per_cycle), number(one.alpha),
            number(one.cost.break_even) if one.places else "",
            number(one.predicted), number(one.speedup.median),
        )
        for one in found
    ]  # fmt: skip
    return table(heads, rows)


def _places(found: Sequence[Summary]) -> list[str]:
    drafting = [one for one in found if one.places]
    deepest = max((len(one.places) for one in drafting), default=0)
    heads = ("arm", "text", *(str(place + 1) for place in range(deepest)))
    rows = [
        (one.arm, one.text, *(f"{share:.1%}" for share in one.places),
         *("" for _ in range(deepest - len(one.places))))
        for one in drafting
    ]  # fmt: skip
    return table(heads, rows) if rows else ["Nothing drafts."]


def _tokens(found: Sequence[Summary]) -> list[str]:
    heads = ("arm", "text", "worst argmax gap", "diverged", "sha256", "tokens")
    rows = []
    for one in found:
        hashes = dict.fromkeys(run.sha256[:12] for run in one.runs)
        gap = max(run.worst_gap for run in one.runs)
        away = sum(run.diverged for run in one.runs) / len(one.runs)
        rows.append(
            (
                one.arm, one.text, "" if math.isnan(gap) else f"{gap:.3g}",
                "" if math.isnan(away) else f"{away:.2%}", " ".join(hashes),
                "plain's" if one.same else "others",
            )
        )  # fmt: skip
    return table(heads, rows)


def _gate(runs: Sequence[Run]) -> list[str]:
    checks = check_gates(runs)
    if not checks:
        return ["No arm has the gate."]
    heads = (
        "arm", "text", "better of plain and ungated", "slower than it",
        f"at most {GATE_TOLERANCE:.0%} slower", "slower by counters",
        "slower than plain one-row",
    )  # fmt: skip
    rows = [
        (
            check.arm, check.text, check.better, percents(check.slower),
            "yes" if check.holds else "NO", f"{check.by_counters:+.1%}",
            percents(check.slower_than_one_row),
        )
        for check in checks
    ]  # fmt: skip
    return table(heads, rows)
