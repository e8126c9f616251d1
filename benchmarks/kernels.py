"""Every product at the shapes of DeepSeek-V4-Flash, against XLA and the memory.

A row is one product by one weight, of one or two rows in bfloat16 (Q4_K, Q2_K, IQ2_XXS:
six experts for each row, all different).  Times are of kernels on the device, medians
over weights that together do not fit into the cache; XLA's are of all it launches for
the eight rows that a decode pass has, which is what a kernel is there instead of.
`error` is against float64, relative to the norm.

Example:
    python benchmarks/kernels.py --out=benchmarks/results/flash/kernels.csv
"""

from __future__ import annotations

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
from ds4jax.pallas.matmul import expert_matmul, grouped_matmul, quant_matmul
from ds4jax.quant import dequantize

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)

EXPERTS, USED = 64, 6
SHAPES = [
    ("Q8_0", "LM head", 129280, 4096, 1),
    ("Q8_0", "attn_q_b", 32768, 1024, 1),
    ("Q8_0", "attn_output_a", 8192, 4096, 8),
    ("Q8_0", "attn_output_b", 4096, 8192, 1),
    ("Q8_0", "shared gate, up", 2048, 4096, 1),
    ("Q8_0", "shared down", 4096, 2048, 1),
    ("Q8_0", "attn_q_a", 1024, 4096, 1),
    ("Q8_0", "attn_kv", 512, 4096, 1),
    ("F16", "indexer query", 8192, 1024, 1),
    ("F16", "compressor", 1024, 4096, 1),
    ("F16", "router", 256, 4096, 1),
    ("IQ2_XXS", "expert gate, up", 2048, 4096, 1),
    ("Q2_K", "expert down", 4096, 2048, 1),
    ("Q4_K", "expert gate, up", 2048, 4096, 1),
    ("Q4_K", "expert down", 4096, 2048, 1),
]
"""Format, what it is, rows and columns of the weight, and its groups."""


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
      operands: to call it with, in one program.
      own: how names of the kernels to count begin; "" counts all, as a mean.
    """
    program = jax.jit(lambda operands: [run(operand) for operand in operands])
    jax.block_until_ready(program(operands))
    found = [x for x in launches(lambda: program(operands)) if x.name.startswith(own)]
    if own:
        return float(np.median([launch.us for launch in found]))
    return sum(launch.us for launch in found) / len(operands)


def measure(
    format: str, name: str, n: int, k: int, groups: int, rows: int
) -> dict[str, Any]:
    """Return the columns that are measured of a line of SHAPES."""
    is_expert = name.startswith("expert")
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

        def plain(ids):
            ids = jnp.pad(ids, ((0, DECODE_ROWS - rows), (0, 0)), "edge")
            return expert_matmul(filled, w, ids, "bfloat16")

        chosen = jax.tree.map(lambda plane: plane[operands[0]], w)
        exact = np.einsum("rui,ruoi->ruo", np.broadcast_to(x, (rows, USED, k)),
                          np.asarray(dequantize(chosen), np.float64))  # fmt: skip
    else:
        count = max(3, min(16, int(2e8 / (n * k))))
        operands = [random_weight(i, format, (n, k)) for i in range(count)]
        nbytes = operands[0].nbytes
        if format == "F16":
            kernel = lambda w: f16.matvec(x[:, 0], w)  # noqa: E731
        else:
            kernel = lambda w: q8_0.matvec(fixed, w, groups)  # noqa: E731
        product = grouped_matmul if groups > 1 else quant_matmul
        plain = lambda w: product(filled, w, "bfloat16")  # noqa: E731
        # Of a large weight, the rows of the first part are enough to compare.
        part = jax.tree.map(lambda plane: plane[: min(n // groups, 1024)], operands[0])
        exact = np.asarray(x[:, 0], np.float64) @ np.asarray(dequantize(part)).T
    found = np.asarray(jax.jit(kernel)(operands[0])).reshape(rows, -1)
    exact = exact.reshape(rows, -1)
    found = found[:, : exact.shape[1]]
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
    for format, name, n, k, groups in SHAPES:
        for rows in (1, 2):
            found = measure(format, name, n, k, groups, rows)
            share = found["bytes"] / found["us"] * 1e6 / bandwidth
            faster = found["xla_us"] / found["us"]
            print(
                f"{format:8s}{name:18s}{n:7d} x {k:5d}, {rows} rows: {found['us']:7.1f}"
                f" us, {share:4.0%} of read bandwidth, {faster:5.1f} times XLA, error"
                f" {found['error']:.0e}",
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
