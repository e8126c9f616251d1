"""What a pass of DeepSeek-V4-Flash takes on a GPU: full shape, ds4's q2 layout.

The weights are random, made on the device (`ds4jax.synthetic`), and so is the state, of
as many tokens as --context says: times do not depend on what is in them, but for which
experts two rows share, which random routing makes few.  Passes follow each other on the
device.  A row is a program at a context: a decode pass of 1, 2 or 4 rows, or a draft of
one token.  `share` is of the time in which its bytes can be read, `kernels` what it
launches, and the `us_` columns are where its time goes: launches run beside each other,
so each moment is split among those that run then, and the columns add up to the time in
which anything does.  r and d are two rows and a draft over one row: at acceptance a,
continuous decoding makes (1 + a) / (r + d) tokens where plain decoding makes one.

A pass looks at all that a state has room for.  That is its context alone, and programs
are compiled for each, unless --ctx_alloc gives room for all of them.

Example:
    python benchmarks/flash.py --context=2048,16384,65536 \\
        --out=benchmarks/results/flash/passes.csv
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from device_time import launches, read_bandwidth, shares

from ds4jax import synthetic, xla_flags
from ds4jax.config import ModelConfig
from ds4jax.decode import driver
from ds4jax.decode.carry import DecodeCarry
from ds4jax.experiments import arm_runs, environment, footprint, pass_times
from ds4jax.experiments.timing import Cost
from ds4jax.experiments.unread import unread
from ds4jax.files import write_table
from ds4jax.model import deepseek

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_LAYERS = flags.DEFINE_integer("layers", 43, "The first so many layers.")
_CONTEXT = flags.DEFINE_list("context", ["2048"], "Tokens before the passes.")
_CTX_ALLOC = flags.DEFINE_integer(
    "ctx_alloc", None, "Tokens that every state has room for; its own by default."
)
_ROWS = flags.DEFINE_list("rows", ["1", "2"], "Passes of so many rows.")

GROUPS = {
    "q8_0": "q8_0", "iq2_xxs": "experts", "q2_k": "experts", "q4_k": "experts",
    "moe": "experts", "two_maps": "q8_0", "attn_maps": "attention_input",
    "attn_out": "attention_output", "attend": "attention",
    "plain": "plain", "hc_": "hyper_connection", "route": "experts",
    "keep": "cache", "compress": "cache", "index": "indexer", "fix": "fixed_point",
}  # fmt: skip
"""Parts of a pass by how the names of their kernels begin; all else is XLA's."""


def measure(run: Callable[[int], Any]) -> dict[str, Any]:
    """Return the columns of what `run(n)` does n times."""
    before = time.perf_counter()
    jax.block_until_ready(run(1))
    compiling = time.perf_counter() - before
    times = pass_times.milliseconds(run)
    once, thrice = (launches(lambda n=n: run(n)) for n in (1, 3))
    parts: collections.Counter[str] = collections.Counter()
    for sign, found in ((-1, once), (1, thrice)):
        for launch, us in zip(found, shares(found), strict=True):
            kind = next((g for s, g in GROUPS.items() if launch.name.startswith(s)), "")
            parts[kind or "xla"] += sign * us / 2
    columns = {f"us_{kind}": 0.0 for kind in (*GROUPS.values(), "xla")}
    return {
        "ms": statistics.median(times),
        "ms_min": times[0],
        "ms_max": times[-1],
        "kernels": (len(thrice) - len(once)) // 2,
        "compile_s": compiling,
    } | (columns | {f"us_{kind}": us for kind, us in parts.items()})


def main(argv: Sequence[str]):
    """Measure and write the table."""
    del argv
    config = synthetic.shorten(ModelConfig.flash(), _LAYERS.value)
    config = dataclasses.replace(config, dtype="bfloat16")
    bandwidth = read_bandwidth()
    where = environment.describe()
    print(f"{where['device']}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    model = deepseek.synthetic_model(config, "ds4-q2", mtp=True)
    jax.block_until_ready(model)
    print(f"{_LAYERS.value} layers are on the device", flush=True)
    table = []
    for context in map(int, _CONTEXT.value):
        carry = driver.create(model, _CTX_ALLOC.value or context + 1)
        carry = jax.block_until_ready(unread(carry, context))
        ms = {}
        for name in (*_ROWS.value, "draft"):
            found = measure(program(model, carry, name))
            ms[name] = found["ms"]
            if name == "draft":
                read = footprint.draft_bytes(model)
            else:
                read = footprint.pass_bytes(model, int(name))
            found["share"] = 1e3 * read / bandwidth / found["ms"]
            print(
                f"{context:>6d} {name:>5s}: {found['ms']:.3f} ms, {found['kernels']}"
                f" kernels, {found['share']:.0%} of read bandwidth; compiled in"
                f" {found['compile_s']:.0f} s",
                flush=True,
            )
            stats = jax.devices()[0].memory_stats() or {}
            table.append(
                {"rows": name, "layers": _LAYERS.value, "context": context}
                | {"ctx_alloc": carry.max_context}
                | {k: _shown(value) for k, value in found.items()}
                | {"read_tb_per_s": f"{bandwidth / 1e12:.3f}"}
                | {"peak_bytes": stats.get("peak_bytes_in_use", "")}
                | where
            )
            write_table(Path(_OUT.value), table)
        if {"1", "2"} <= ms.keys():
            cost = Cost(ms["2"] / ms["1"], ms["draft"] / ms["1"])
            print(
                f"{context:>6d} plain {1e3 / ms['1']:.1f} tokens/s; r = {cost.r:.3f},"
                f" d = {cost.d:.3f}, break-even at {cost.break_even:.2f}; continuous at"
                f" full acceptance {cost.speedup(1) * 1e3 / ms['1']:.1f} tokens/s (by"
                " these times)"
            )


def program(
    model: deepseek.Model, carry: DecodeCarry, name: str
) -> Callable[[int], Any]:
    """Return what runs a row of the table n times."""
    if name == "draft":
        return lambda n: arm_runs.drafts(model, carry, jnp.int32(n), 1, "trained")
    return lambda n: arm_runs.target_passes(
        model, carry.cache, jnp.int32(n), int(name), True
    )


def _shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    xla_flags.set_flags()
    app.run(main)
