"""Every kernel at the shapes of DeepSeek-V4-Flash, against XLA and the memory.

A line is what a kernel computes for one, two or four rows of a decode pass, or for the
rows of a long one, with random weights and states: products (`kernel_products.py`),
what begins with the streams (`kernel_blocks.py`), what else a decode pass does
(`kernel_parts.py`) and what prefill does (`kernel_prefill.py`).  Times are of kernels
on the device, their sum, medians over operands that together do not fit into the cache,
unless they are small.  XLA's are of all that it launches for the eight rows that a
decode pass has, which is what a kernel is there instead of.  Bytes are of what has to
be read: weights, rows of the state that are seen, activations.  `error` is of products,
against float64, relative to the norm.

(A file called `kernels.py` would be what transformers, in `peer.py`, takes for the
package of that name.)

Example:
    python benchmarks/kernel_times.py --out=benchmarks/results/flash/kernels.csv
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kernel_blocks
import kernel_parts
import kernel_prefill
import kernel_products
import numpy as np
from absl import app, flags
from device_time import launches, read_bandwidth
from kernel_case import Case

from ds4jax import xla_flags
from ds4jax.experiments import environment
from ds4jax.files import write_table

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)

PARTS = kernel_products, kernel_blocks, kernel_parts, kernel_prefill
CASES = [part.CASES for part in PARTS]

CACHE = 50e6
"""Bytes that stay on the device between launches."""

_tracing = threading.Lock()


def compiled(case: Case, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a case's operands, compiled; threads may do so at once."""
    # What a kernel serves is changed while a case of XLA's is traced.
    with _tracing:
        shapes = jax.eval_shape(case.draw)
        lowered = jax.jit(run, donate_argnums=case.donated).lower(*shapes)
    return lowered.compile()


def compile_all(cases: Sequence[Case]) -> list[list[futures.Future[Any]]]:
    """Return the programs of cases, or why there are none: XLA's, and by width.

    All are there before one is timed: to load a program may copy to the device.
    """
    with futures.ThreadPoolExecutor() as pool:
        return [
            [
                pool.submit(compiled, case, run)
                for run in (
                    case.xla,
                    *(functools.partial(case.run, width) for width in case.widths),
                )
            ]
            for case in cases
        ]


def device_us(
    program: Callable[..., Any],
    operands: tuple[Any, ...],
    turns: int,
    others: tuple[str, ...],
) -> float:
    """Return the device's microseconds for a call, the median of some.

    Args:
      program: what to time.
      operands: of a call, each of which has its own copies.
      turns: how many calls.
      others: how names of kernels begin that are not counted.
    """
    copy = lambda: jax.tree.map(jnp.copy, operands)  # noqa: E731
    jax.block_until_ready(program(*copy()))
    copies = jax.block_until_ready([copy() for _ in range(turns)])
    found = launches(lambda: [program(*own) for own in copies])
    us = [launch.us for launch in found if not launch.name.startswith(others)]
    # Every call launches the same, and none before the last one's end.
    return float(np.median(np.reshape(us, (turns, -1)).sum(1)))


def error_of(found: Any, exact: np.ndarray, width: int) -> float:
    """Return the error of the first rows' first results, relative to their norm.

    Args:
      found: of all rows.
      exact: [R, ..., N], of all rows their first N results.
      width: how many rows count.
    """
    found = np.asarray(found).reshape(*exact.shape[:-1], -1)
    found = found[:width, ..., : exact.shape[-1]]
    return float(np.linalg.norm(found - exact[:width]) / np.linalg.norm(exact[:width]))


@contextlib.contextmanager
def surviving(what: str, failed: list[str]) -> Iterator[None]:
    """Print in a line why the block failed, if it did, add it to `failed` and go on."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{what}: failed, {reason}", flush=True)
        failed.append(what)


def measure(
    case: Case, programs: Sequence[futures.Future[Any]], failed: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield what is measured of a case, a dictionary for each of its widths.

    Args:
      case: to measure.
      programs: of `compile_all`.
      failed: gets what could not be measured.
    """
    name = f"{case.kernel}: {case.what}"
    by_xla, *by_kernel = programs
    with surviving(name, failed):
        operands = jax.block_until_ready(case.draw())
        least = case.nbytes(case.widths[0], *operands)
        turns = min(max(3, math.ceil(2.5 * CACHE / least)), 100)
        xla_us = device_us(by_xla.result(), operands, turns, case.others)
        exact = case.exact and case.exact(*operands)
        for width, program in zip(case.widths, by_kernel, strict=True):
            with surviving(f"{name}, {width} rows", failed):
                program, error = program.result(), None
                us = device_us(program, operands, turns, case.others)
                if exact is not None:
                    first = jax.tree.leaves(program(*operands))[0]
                    error = error_of(first, exact, width)
                nbytes = int(case.nbytes(width, *operands))
                yield dict(rows=width, bytes=nbytes, us=us, xla_us=xla_us, error=error)


def main(argv: Sequence[str]) -> str | None:
    """Measure all and write the table; return how many failures there were, if any."""
    del argv
    bandwidth = read_bandwidth()
    where = environment.describe()
    print(f"{where['device']}: reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    table: list[dict[str, Any]] = []
    failed: list[str] = []

    def add(case: Case, found: dict[str, Any]):
        share = found["bytes"] / found["us"] * 1e6 / bandwidth
        error = "" if found["error"] is None else f"{found['error']:.1e}"
        print(
            f"{case.kernel:17s}{case.shape['format']:8s}{case.what:33s}"
            f"{found['rows']:5d} rows: {found['us']:9.1f} us, {share:4.0%} of read"
            f" bandwidth, {found['xla_us'] / found['us']:5.1f} times XLA"
            + (error and f", error {error}"),
            flush=True,
        )
        table.append(
            {"kernel": case.kernel, "what": case.what, **case.shape}
            | {"rows": found["rows"], "bytes": found["bytes"]}
            | {"us": f"{found['us']:.2f}", "share_of_read_bandwidth": f"{share:.3f}"}
            | {"xla_us": f"{found['xla_us']:.1f}", "error": error}
            | {"read_tb_per_s": f"{bandwidth / 1e12:.3f}"}
            | where
        )
        write_table(Path(_OUT.value), table)

    for cases in CASES:
        for case, programs in zip(cases, compile_all(cases), strict=True):
            for found in measure(case, programs, failed):
                add(case, found)
    return f"{len(failed)} failed" if failed else None


if __name__ == "__main__":
    xla_flags.set_flags()
    app.run(main)
