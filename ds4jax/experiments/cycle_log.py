"""What a run's cycles drafted and took, line by line, as ds4's log switches ask for.

A logged run goes to the device for one cycle at a time, and once more before it to see
the drafts; its tokens are those of any other run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.decode import cycles, driver, transitions
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import GREEDY, Decoding
from ds4jax.decode.precedence import Logs
from ds4jax.model.deepseek import Model


@functools.partial(jax.jit, static_argnames="decoding")
def _drafts(
    model: Model, carry: DecodeCarry, decoding: Decoding
) -> tuple[Int[Array, "B depth"], Float[Array, "B"]]:
    """Return what the next cycle would draft, and the last guess's lead."""
    if decoding.mode.kind == "chained":
        base = dataclasses.replace(decoding, mode=GREEDY.mode, policy="warm")
        carry = cycles.cycle(model, carry, jnp.int32(-1), base)
    first = transitions.first_token(carry, decoding.temperature)
    depth = max(decoding.depth, 1)
    return transitions.draft(
        model, carry, first, depth, decoding.temperature, decoding.pairing
    )[1:]


def stream(
    model: Model,
    carry: DecodeCarry,
    decoding: Decoding,
    eos: int,
    logs: Logs,
    write: Callable[[str], None],
) -> Iterator[tuple[DecodeCarry, list[int]]]:
    """Yield what `driver.stream` does, a cycle at a time, and write lines about each.

    Args:
      model: the model.
      carry: of one sequence, with the state of a head; given up.
      decoding: how to decode.
      eos: token that ends the sequence, -1 for none.
      logs: what to write.
      write: gets each line.
    """
    probe = _Probe()
    while bool(carry.active[0]):
        at, before = int(carry.length[0]), _counts(carry)
        guesses, lead = (x[0] for x in _drafts(model, carry, decoding))
        began = time.perf_counter()
        carry = jax.block_until_ready(driver.run(model, carry, decoding, eos, 1))
        took = time.perf_counter() - began
        new = driver.committed(carry)[at:]
        drafted, accepted = _counts(carry) - before
        if logs.timing:
            write(f"[timing] position {at}: {1e3 * took:.2f} ms, {len(new)} tokens")
        if logs.confidence and drafted:
            write(
                f"[confidence] position {at}: drafted {drafted}, accepted {accepted},"
                f" lead {float(lead):.3f}"
            )
        if logs.spec and accepted < drafted:
            missed = int(guesses[accepted])
            write(f"[spec] position {at + len(new)}: missed, drafted {missed}")
        if logs.probe and not decoding.depth:
            probe.see(at, new[0], int(guesses[0]), write)
        yield carry, new


def _counts(carry: DecodeCarry) -> np.ndarray:
    counts = carry.statistics.of()
    return np.array([counts["drafted"], counts["accepted"]])


class _Probe:
    """Says how often a draft in plain decoding would be right."""

    def __init__(self):
        self._pending: int | None = None
        self._right = self._seen = 0

    def see(self, at: int, token: int, guess: int, write: Callable[[str], None]):
        """Take in the token that was committed at a position, and the next's guess."""
        if self._pending is not None:
            self._seen += 1
            self._right += self._pending == token
            write(
                f"[probe] position {at}: token {token}, draft {self._pending},"
                f" hit {self._right}/{self._seen}"
            )
        self._pending = guess
