"""What a pass of DeepSeek-V4-Flash takes on a GPU: full shape, ds4's q2 layout.

The weights are random, made on the device (`ds4jax.synthetic`), and so is the state, of
--context tokens: times do not depend on what is in them, but for which experts two
rows share, which random routing makes few.  Passes follow each other on the device.
A row is a program: a decode pass of 1, 2 or 4 rows, or a draft of one token.  `share`
is of the time in which its bytes can be read, `kernels` what it launches, and the `us_`
columns are where its time goes.  r and d are two rows and a draft over one row: at
acceptance a, continuous decoding commits (1 + a) / (r + d) tokens where plain decoding
commits one.

Example:
    python benchmarks/flash.py --out=benchmarks/results/flash/passes.csv
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from device_time import launches, read_bandwidth

from ds4jax import synthetic, xla_flags
from ds4jax.config import ModelConfig
from ds4jax.decode import carry as carries
from ds4jax.experiments import arm_runs, environment
from ds4jax.files import write_table
from ds4jax.model import deepseek

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_LAYERS = flags.DEFINE_integer("layers", 43, "The first so many layers.")
_CONTEXT = flags.DEFINE_integer("context", 2048, "Tokens before the passes.")
_ROWS = flags.DEFINE_list("rows", ["1", "2"], "Passes of so many rows.")

READ = {"1": 9.559e9, "2": 11.342e9, "draft": 0.831e9}
"""Bytes of a pass of all 43 layers: `ds4jax inspect` counts them."""

GROUPS = {
    "q8_0": "q8_0", "iq2_xxs": "experts", "q2_k": "experts", "q4_k": "experts",
    "f16": "f16", "hc_": "hyper_connection", "attend": "attention",
    "fix": "fixed_point",
}  # fmt: skip
"""Parts of a pass by how the names of their kernels begin; all else is XLA's."""


def measure(run: Callable[[int], Any]) -> dict[str, Any]:
    """Return the columns of what `run(n)` does n times."""
    before = time.perf_counter()
    jax.block_until_ready(run(1))
    compiling = time.perf_counter() - before
    times = []
    for _ in range(5):
        before = time.perf_counter()
        jax.block_until_ready(run(20))
        times.append((time.perf_counter() - before) / 20)
    once, thrice = (launches(lambda n=n: run(n)) for n in (1, 3))
    parts: collections.Counter[str] = collections.Counter()
    for sign, found in ((-1, once), (1, thrice)):
        for launch in found:
            kind = next((g for s, g in GROUPS.items() if launch.name.startswith(s)), "")
            parts[kind or "xla"] += sign * launch.us / 2
    columns = {f"us_{kind}": 0.0 for kind in (*GROUPS.values(), "xla")}
    return {
        "ms": 1e3 * sorted(times)[2],
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
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
    carry = carries.create(config, 2 * _CONTEXT.value, mtp=True)
    length = jnp.array([_CONTEXT.value], jnp.int32)
    cache = dataclasses.replace(carry.cache, length=length)
    jax.block_until_ready(model)
    print(f"{_LAYERS.value} layers are on the device", flush=True)

    def passes(rows: int) -> Callable[[int], Any]:
        times = lambda n: (jnp.int32(n), rows, True)  # noqa: E731
        return lambda n: arm_runs.target_passes(model, cache, *times(n))

    programs = {rows: passes(int(rows)) for rows in _ROWS.value}
    programs["draft"] = lambda n: arm_runs.drafts(
        model, carry, jnp.int32(n), 1, "trained"
    )
    table = []
    for name, run in programs.items():
        found = measure(run)
        limit = READ.get(name, 0.0) / bandwidth * 1e3 if _LAYERS.value == 43 else 0.0
        found["share"] = limit / found["ms"]
        print(
            f"{name:>5s}: {found['ms']:.3f} ms, {found['kernels']} kernels,"
            f" {found['share']:.0%} of read bandwidth; compiled in"
            f" {found['compile_s']:.0f} s",
            flush=True,
        )
        stats = jax.devices()[0].memory_stats() or {}
        table.append(
            {"rows": name, "layers": _LAYERS.value, "context": _CONTEXT.value}
            | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
            | {"read_tb_per_s": f"{bandwidth / 1e12:.3f}"}
            | {"peak_bytes": stats.get("peak_bytes_in_use", "")}
            | where
        )
        write_table(Path(_OUT.value), table)
    ms = {row["rows"]: float(row["ms"]) for row in table}
    if "1" in ms and "2" in ms:
        r, d = ms["2"] / ms["1"], ms["draft"] / ms["1"]
        print(
            f"plain {1e3 / ms['1']:.1f} tokens/s; r = {r:.3f}, d = {d:.3f}, break-even"
            f" at {r + d - 1:.2f}; continuous at full acceptance"
            f" {2e3 / (ms['2'] + ms['draft']):.1f} tokens/s (by these times)"
        )


if __name__ == "__main__":
    xla_flags.set_flags()
    app.run(main)
