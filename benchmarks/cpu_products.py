"""What the products of a pass of one row take by themselves, on a CPU.

They are those of the shipped trunk in float32, as the CPU multiplies them: dense ones
and those of the experts that a token chooses, by branches, so that none is copied.
Products need nothing of each other here and all threads share them.  A pass of one row
takes that long if all else in it costs nothing, which says what `peer.py` can show.

Example:
    python benchmarks/cpu_products.py \\
        --out=benchmarks/results/tiny_model/cpu_products.csv
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from ds4jax import assets, gguf
from ds4jax.decode import carry as carries
from ds4jax.experiments import environment
from ds4jax.files import write_table
from ds4jax.model.deepseek import Model, build
from ds4jax.pallas.passes import watching
from ds4jax.quant import dequantize

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_PASSES = flags.DEFINE_integer("passes", 64, "Timed together.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds, the first dropped.", lower_bound=2)


def products(model: Model) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the weights of a pass of one row: dense ones, and stacks of experts.

    Those are [Out, In] and [E, Out, In]; a token chooses `experts_used` of each stack.
    """
    dense, stacks = [], []

    def report(x, w, expert_ids):
        del x
        (dense if expert_ids is None else stacks).append(jnp.asarray(dequantize(w)))

    cache = carries.create(model.config, 64, mtp=False).cache
    step = lambda tokens: model.modules().trunk(tokens, cache, exact=False)  # noqa: E731
    with watching(report):
        jax.eval_shape(step, jnp.zeros((1, 1), jnp.int32))
    return dense, stacks


@functools.partial(jax.jit, static_argnames="used")
def multiply(
    dense: list[jax.Array], experts: list[list[jax.Array]], used: int, passes: Any
) -> dict[int, jax.Array]:
    """Multiply vectors by all dense weights and by `used` experts of each stack."""
    sizes = {w.shape[1] for w in dense} | {stack[0].shape[1] for stack in experts}

    def turn(number, vectors):
        found = [w @ vectors[w.shape[1]] for w in dense]
        for stack in experts:
            choices = [
                lambda x, own=stack[first : first + used]: [w @ x for w in own]
                for first in range(0, len(stack) - used + 1, used)
            ]
            which = jax.lax.rem(number, len(choices))
            found += jax.lax.switch(which, choices, vectors[stack[0].shape[1]])
        # All of every product is for something, and a pass begins when the last ends.
        rest = sum(jnp.max(out) for out in found) * 1e-20
        return {size: x + rest for size, x in vectors.items()}

    return jax.lax.fori_loop(0, passes, turn, {size: jnp.ones(size) for size in sizes})


def main(argv: Sequence[str]):
    """Measure, print and write the table."""
    del argv
    config, trunk = gguf.load_trunk(assets.trunk())
    dense, stacks = products(build(config, trunk))
    used = config.experts_used
    experts = [list(stack) for stack in stacks]
    nbytes = sum(w.nbytes for w in dense)
    nbytes += sum(used * stack[0].nbytes for stack in experts)
    times = []
    for _ in range(_ROUNDS.value):
        before = time.perf_counter()
        jax.block_until_ready(multiply(dense, experts, used, _PASSES.value))
        times.append(1e3 * (time.perf_counter() - before) / _PASSES.value)
    ms = sorted(times[1:])
    middle = statistics.median(ms)
    print(
        f"{nbytes / 1e6:.1f} MB a pass of one row: {middle:.2f} ms ({ms[0]:.2f} to"
        f" {ms[-1]:.2f}), {nbytes / middle / 1e6:.1f} GB/s"
    )
    row = {"bytes": nbytes, "rounds": len(ms), "ms": f"{middle:.4g}"}
    row |= {"ms_min": f"{ms[0]:.4g}", "ms_max": f"{ms[-1]:.4g}"}
    write_table(Path(_OUT.value), [row | environment.describe()])


if __name__ == "__main__":
    app.run(main)
