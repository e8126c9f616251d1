"""Runs of an ablation that never was, for tests of what is made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ds4jax.experiments.arms import Arm, Settings, arms
from ds4jax.experiments.runs_csv import Run

SETTINGS = Settings(
    modes=("continuous", "chained"), depths=(0, 1, 2), pairings=("trained", "ds4"),
    gates=(False, True), texts=("copy", "prose"), seeds=(0, 1), tokens=100, rounds=3,
)  # fmt: skip
ORIGIN = dict(
    device="a CPU", devices="1", jax="0.11.2/0.11.2", driver="cpu", python="3.11.9",
    commit="0123456789ab", model="trunk.gguf:1 mtp.gguf:1", config=SETTINGS.to_json(),
)  # fmt: skip
ONE_ROW_MS = 10.0
"""Of every pass of one row, which is all that plain decoding of one row takes."""


def run(arm: Arm, text: str = "copy", seed: int = 0, number: int = 1, **changes) -> Run:
    """Return a run whose times follow the cost model exactly.

    A pass of the exact class takes 1.5 passes of one row, a batched one 1.2, a draft
    0.2 a place; the first of a chain's drafts is accepted in 8 of 10 cycles, each
    further one half as often.
    """
    wide = 1.5 if arm.verifier == "exact" else 1.2
    if not arm.depth:
        wide = 1.5 if arm.verifier == "exact" else 1.0
    chained = arm.mode == "chained"
    target = wide + 1.5 * chained
    cycles = 100 if not arm.depth else 40
    accepted = [int(cycles * 0.8 / 2**i) * (i < arm.depth) for i in range(4)]
    tokens = cycles * (1 + chained) + sum(accepted)
    seconds = cycles * (target + 0.2 * arm.depth) * ONE_ROW_MS / 1e3
    # As many tokens as others: the time is that of 100.
    seconds *= 100 / tokens
    named: dict[str, Any] = dict(
        arm=arm.name, text=text, seed=seed, round=number, **dataclasses.asdict(arm),
        tokens=tokens, seconds=seconds, tokens_per_second=100 / seconds,
        passes=cycles * (1 + chained), decodes=cycles * chained, cold_cycles=0,
        shared_reads_per_token=cycles * (1 + chained) / tokens,
        target_ms=target * ONE_ROW_MS, draft_ms=0.2 * arm.depth * ONE_ROW_MS,
        sha256=f"{text}{seed}" + "0" * 12, worst_gap=0.0, diverged=0.0, **ORIGIN,
    )  # fmt: skip
    named |= {f"drafted_{i + 1}": cycles * (i < arm.depth) for i in range(4)}
    named |= {f"accepted_{i + 1}": count for i, count in enumerate(accepted)}
    named |= changes
    return Run(turns=(named["seconds"],), **named)


def runs() -> list[Run]:
    """Return all runs of SETTINGS; those of the first round are absurdly slow."""
    return [
        dataclasses.replace(found, seconds=found.seconds * (1 if number else 1000))
        for number in range(1 + SETTINGS.rounds)
        for text in SETTINGS.texts
        for seed in SETTINGS.seeds
        for arm in arms(SETTINGS)
        for found in [run(arm, text, seed, number)]
    ]
