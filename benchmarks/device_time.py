"""What a GPU did, from JAX's profiler: the kernels of a call, with their times."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel, or one copy.

    Attributes:
      name: as the compiler called it.
      start: nanoseconds.
      us: microseconds it took on the device.
    """

    name: str
    start: float
    us: float


def launches(call: Callable[[], object]) -> list[Launch]:
    """Return what `call`, which should have run before, has the GPU do, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    found = [
        Launch(event.name, event.start_ns, event.duration_ns / 1e3)
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]
    return sorted(found, key=lambda launch: launch.start)


def shares(found: Sequence[Launch]) -> list[float]:
    """Return the microseconds of the time line that each launch takes.

    A moment is split equally among the launches that run then, so that they add up to
    the time in which anything runs.
    """
    events = []
    for number, launch in enumerate(found):
        events += [
            (launch.start, False, number),
            (launch.start + 1e3 * launch.us, True, number),
        ]
    taken = [0.0] * len(found)
    running, before = set(), 0.0
    for at, ends, number in sorted(events):
        for other in running:
            taken[other] += (at - before) / 1e3 / len(running)
        (running.remove if ends else running.add)(number)
        before = at
    return taken


def read_bandwidth() -> float:
    """Return the bytes a second at which the device reads 2 GiB, best of ten."""
    block = jax.random.normal(jax.random.key(0), (2**29,))
    total = jax.jit(lambda x: x.sum())
    jax.block_until_ready(total(block))
    times = []
    for _ in range(10):
        kernels = launches(lambda: total(block))
        times.append(sum(launch.us for launch in kernels))
    return block.nbytes / min(times) * 1e6
