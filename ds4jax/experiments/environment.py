"""Where a measurement was made: what a row of results says beside its figures."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import jax
import jaxlib.version

import ds4jax


def describe() -> dict[str, str]:
    """Return the device, jax, driver, Python and commit of this process.

    `driver` is the platform's own version (CUDA's, say); `commit` is that of the
    checkout that ds4jax runs from, with `+` if files were changed since, or the
    package's version where it is installed without one.  DS4JAX_COMMIT says it where
    the sources are a copy without their history.
    """
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": str(jax.device_count()),
        "jax": f"{jax.__version__}/{jaxlib.version.__version__}",
        "driver": " ".join(device.client.platform_version.split()),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    """Return the CPU's name, if the system tells it, and how many cores there are."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    if given := os.environ.get("DS4JAX_COMMIT"):
        return given
    root = Path(ds4jax.__file__).parent.parent
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return ds4jax.__version__
        changed = git("status", "--porcelain", "--untracked-files=no", "ds4jax")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ds4jax.__version__
