"""The most memory that a command holds, beside the files that it maps (Linux).

Anonymous memory is what malloc gives: on the CPU device arrays are in it, mapped files
are not.  Sampled every 10 ms, of the process and of those that it starts.

    python benchmarks/memory.py ds4jax convert --gguf=f.gguf --plan=f16 --out=g.gguf
"""

import subprocess
import sys
import time
from pathlib import Path


def anonymous(process: int) -> int:
    """Return the bytes that no file backs; 0 of a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = (line.split() for line in status.splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line[0] == "RssAnon:")


def started(process: int) -> list[int]:
    """Return the processes that one has started, and that those have."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += [child, *started(child)]
    return found


def main():
    """Run the words that follow as a command and print what it held at most."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} COMMAND [WORD ...]")
    own, all_of_them = 0, 0
    with subprocess.Popen(sys.argv[1:]) as run:
        while run.poll() is None:
            first = anonymous(run.pid)
            own = max(own, first)
            rest = sum(anonymous(process) for process in started(run.pid))
            all_of_them = max(all_of_them, first + rest)
            time.sleep(0.01)
    print(
        f"peak anonymous memory: {own / 2**30:.2f} GiB in the process,"
        f" {all_of_them / 2**30:.2f} GiB with those that it started"
    )
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
