"""What a table says of a replay: speed-ups, and the cost model beside them."""

from __future__ import annotations

import jax

from ds4jax.experiments import footprint
from ds4jax.experiments.context_sweep import Point
from ds4jax.model.deepseek import Model


def columns(point: Point, plain: Point, model: Model) -> dict[str, str]:
    """Return the columns of a way, measured after plain decoding from the same state.

    Those of the cost model (see `timing.Cost`) are empty in plain decoding's own row.
    `weight_gb_per_s` is the rate at which weights were read, if routing is random, and
    `peak_bytes` the most memory that this process has had in use so far.
    """
    cycles = point.passes - point.decodes
    accepted = sum(point.accepted) / max(cycles, 1)
    predicted, r, d, break_even, pass_ms = [""] * 5
    if point.cost is not None:
        cost = point.cost
        predicted = f"{cost.speedup(accepted):.4f}"
        r, d, break_even = (
            f"{value:.4f}" for value in (cost.r, cost.d, cost.break_even)
        )
        pass_ms = f"{point.pass_ms:.4f}"
    rate = point.way.rate
    depth = point.way.decoding.depth
    cycle = footprint.pass_bytes(model, 1 + depth)
    if depth:
        cycle += depth * footprint.draft_bytes(model)
    read = cycles * cycle + point.decodes * footprint.pass_bytes(model, 1)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "replay": "" if rate is None else f"{rate:g}",
        "accepted_per_cycle": "" if rate is None else f"{accepted:.4f}",
        "speedup": f"{plain.decode_seconds / point.decode_seconds:.4f}",
        "predicted_speedup": predicted,
        "r": r,
        "d": d,
        "break_even": break_even,
        "one_row_ms": pass_ms,
        "plains_tokens": "yes" if point.tokens == plain.tokens else "no",
        "weight_gb_per_s": f"{read / point.decode_seconds / 1e9:.1f}",
        "peak_bytes": str(stats.get("peak_bytes_in_use", "")),
    }
