"""Every product at the shapes of DeepSeek-V4-Flash, against XLA and the memory.

A row is what one launch multiplies, a weight or several of the same input, with one,
two or four rows in bfloat16 (Q4_K, Q2_K, IQ2_XXS: six experts for each row, all
different).  Times are of kernels on the device, medians over weights that together do
not fit into the cache; XLA's are of all it launches for the eight rows that a decode
pass has, which is what a kernel is there instead of.
`error` is against float64, relative to the norm.

Example:
    python benchmarks/kernels.py --out=benchmarks/results/flash/kernels.csv
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from device_time import launches, read_bandwidth

from ds4jax import synthetic, xla_flags
from ds4jax.experiments import environment
from ds4jax.files import write_table
from ds4jax.model.cache import DECODE_ROWS
from ds4jax.pallas import experts, f16, q8_0
from ds4jax.pallas.fixed_point import Order, fix
from ds4jax.pallas.matmul import expert_matmul, grouped_matmul, quant_matmuls
from ds4jax.quant import dequantize

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)

EXPERTS, USED = 64, 6
SHAPES = [
    ("Q8_0", "LM head", [129280], 4096, 1),
    ("Q8_0", "attn_q_b", [32768], 1024, 1),
    ("Q8_0", "attn_output_a", [8192], 4096, 8),
    ("Q8_0", "attn_output_b", [4096], 8192, 1),
    ("Q8_0", "shared gate, up", [2048], 4096, 1),
    ("Q8_0", "shared down", [4096], 2048, 1),
    ("Q8_0", "attn_q_a, attn_kv", [1024, 512], 4096, 1),
    ("F16", "indexer query", [8192], 1024, 1),
    ("F16", "CSA compressor", [1024, 1024], 4096, 1),
    ("F16", "HCA compressor", [512, 512], 4096, 1),
    ("F16", "indexer compressor", [256, 256], 4096, 1),
    ("F16", "indexer heads", [64], 4096, 1),
    ("F16", "router", [256], 4096, 1),
    ("IQ2_XXS", "expert gate, up", [2048], 4096, 1),
    ("Q2_K", "expert down", [4096], 2048, 1),
    ("Q4_K", "expert gate, up", [2048], 4096, 1),
    ("Q4_K", "expert down", [4096], 2048, 1),
]
"""Format, what it is, rows of each weight and their columns, and a weight's groups."""

CACHE = 50e6
"""Bytes that stay on the device between launches."""


def random_weight(seed: int, format: str, shape: tuple[int, ...]) -> Any:
    """Return a weight of a format, values of size 1 / sqrt(in) or so."""
    key = jax.random.key(seed)
    if format == "F16":
        return (jax.random.normal(key, shape) / 64).astype(jnp.float16)
    return synthetic.blocks(key, format, shape)


def median_us(run: Callable[[Any], Any], operands: Sequence[Any], own: str) -> float:
    """Return the device's microseconds for one of `operands`.

    Args:
      run: what to time.
      operands: to call it with, one after the other.
      own: how names of the kernels to count begin; "" counts all, as a mean.
    """
    program = jax.jit(run)
    jax.block_until_ready(program(operands[0]))
    found = launches(lambda: [program(operand) for operand in operands])
    found = [launch for launch in found if launch.name.startswith(own)]
    if own:
        return float(np.median([launch.us for launch in found]))
    return sum(launch.us for launch in found) / len(operands)


def measure(
    format: str, name: str, outs: list[int], k: int, groups: int, rows: int
) -> dict[str, Any]:
    """Return the columns that are measured of a line of SHAPES."""
    is_expert, n = name.startswith("expert"), outs[0]
    vectors = USED if is_expert and n > k else groups
    x = jax.random.normal(jax.random.key(1), (rows, vectors, k))
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    order = experts.FORMATS[format].order if is_expert else Order()
    fixed = fix(x.reshape(-1, k), "bfloat16", order)
    filled = jnp.pad(x, ((0, DECODE_ROWS - rows), (0, 0), (0, 0)), "edge")
    if is_expert:
        w = random_weight(0, format, (EXPERTS, n, k))
        operands = [choice(i, rows) for i in range(8)]
        nbytes = w.nbytes // EXPERTS * rows * USED
        kernel = lambda ids: experts.matvec(fixed, w, ids)  # noqa: E731

        padding = (0, DECODE_ROWS - rows), (0, 0)
        plain = lambda ids: expert_matmul(  # noqa: E731
            filled, w, jnp.pad(ids, padding, "edge"), "bfloat16"
        )
        chosen = jax.tree.map(lambda plane: plane[operands[0]], w)
        exact = np.einsum("rui,ruoi->ruo", np.broadcast_to(x, (rows, USED, k)),
                          np.asarray(dequantize(chosen), np.float64))  # fmt: skip
    else:
        make = lambda i: [random_weight(i, format, (n, k)) for n in outs]  # noqa: E731
        nbytes = sum(w.nbytes for w in make(0))
        operands = [make(i) for i in range(max(3, math.ceil(2.5 * CACHE / nbytes)))]
        plain = lambda ws: quant_matmuls(filled, ws, "bfloat16")  # noqa: E731
        if format == "F16":
            kernel = lambda ws: f16.matvecs(x[:, 0].astype("bfloat16"), ws)  # noqa: E731
        elif groups > 1:
            plain = lambda ws: grouped_matmul(filled, ws[0], "bfloat16")  # noqa: E731
            kernel = lambda ws: q8_0.matvec(fixed, ws[0], groups)  # noqa: E731
        else:
            kernel = lambda ws: q8_0.matvecs(fixed, ws)  # noqa: E731

        # Of a large weight, the rows of the first part are enough to compare.
        most = min(n // groups, 1024)
        part = jax.tree.map(lambda plane: plane[:most], operands[0][0])
        exact = np.asarray(x[:, 0], np.float64) @ np.asarray(dequantize(part)).T
    found = jax.tree.leaves(jax.jit(kernel)(operands[0]))[0].reshape(rows, -1)
    exact = exact.reshape(rows, -1)
    found = np.asarray(found[:, : exact.shape[1]])
    return {
        "bytes": nbytes,
        "us": median_us(kernel, operands, format.lower()),
        "xla_us": median_us(plain, operands, ""),
        "error": np.linalg.norm(found - exact) / np.linalg.norm(exact),
    }


def choice(seed: int, rows: int) -> jax.Array:
    """Return different experts for all slots of all rows."""
    ids = jax.random.permutation(jax.random.key(seed), EXPERTS)[: rows * USED]
    return ids.astype(jnp.int32).reshape(rows, USED)


def main(argv: Sequence[str]):
    """Measure all and write the table."""
    del argv
    bandwidth = read_bandwidth()
    where = environment.describe()
    print(f"{where['device']}: reads {bandwidth / 1e12:.2f} TB/s")
    table = []
    for format, name, outs, k, groups in SHAPES:
        n = "+".join(map(str, outs))
        for rows in (1, 2, 4):
            found = measure(format, name, outs, k, groups, rows)
            share = found["bytes"] / found["us"] * 1e6 / bandwidth
            faster = found["xla_us"] / found["us"]
            print(
                f"{format:8s}{name:20s}{n:>9s} x {k:5d}, {rows} rows:"
                f" {found['us']:7.1f} us, {share:4.0%} of read bandwidth, {faster:5.1f}"
                f" times XLA, error {found['error']:.0e}",
                flush=True,
            )
            table.append(
                dict(
                    format=format, weight=name, out=n, into=k, groups=groups, rows=rows
                )
                | {"bytes": found["bytes"], "us": f"{found['us']:.2f}"}
                | {"share_of_read_bandwidth": f"{share:.3f}"}
                | {"xla_us": f"{found['xla_us']:.1f}", "error": f"{found['error']:.1e}"}
                | {"read_tb_per_s": f"{bandwidth / 1e12:.3f}"}
                | where
            )
            write_table(Path(_OUT.value), table)


if __name__ == "__main__":
    xla_flags.set_flags()
    app.run(main)
