"""Print how far a process grows while it loads a trunk: memory_test.py runs it.

    python loading_memory.py trunk.gguf

Two numbers of bytes: with every tensor put on the device as it is read, and with all of
them packed on the host first.
"""

import ctypes
import functools
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ds4jax import gguf
from ds4jax.model import deepseek


def anonymous() -> int:
    """Return the bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_growth(function: Callable[[], object]) -> int:
    """Return how far anonymous memory grows while `function` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left would hide growth
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.0005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def main():
    path = sys.argv[1]

    def load(place):
        config, weights = gguf.load_trunk(path, place)
        return deepseek.build(config, weights, packed=True)

    place = functools.partial(deepseek.place, packed=True)
    load(place)  # what only the first time costs
    print(peak_growth(lambda: load(place)), peak_growth(lambda: load(None)))


if __name__ == "__main__":
    main()
