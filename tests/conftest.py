"""What every test gets: the CPU, how and where programs are compiled, the markers."""

import ctypes
import gc
import importlib.metadata
import inspect
import math
import os
from pathlib import Path

import jaxtyping
import pytest

ALONE = ["--xla_cpu_parallel_codegen_split_count=1"]
"""For XLA to compile a program in one thread: the other processor has a worker too."""
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
]
"""For XLA to compile in half the time, by optimising less."""
if importlib.metadata.version("jaxlib") < "0.11":
    # A newer one does not know the flag, nor needs it.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
ENOUGH = 2 * 2**30
"""Bytes of a process that keeps programs: two of them fit into any machine."""

# Tracing makes so many objects that looking for garbage takes a tenth of its time.
gc.set_threshold(50_000)


def _sparing(*, typechecker, checked=jaxtyping.jaxtyped):
    """Return jaxtyping's decorator, which leaves alone what promises nothing.

    Functions inside others are decorated again each time they are traced, which takes a
    fifth of tracing's time, and few of them have a type.
    """
    decorate = checked(typechecker=typechecker)
    return lambda it: decorate(it) if _promises(it) else it


def _promises(it) -> bool:
    return bool(it.__annotations__) if inspect.isfunction(it) else True


jaxtyping.jaxtyped = _sparing


def pytest_configure(config: pytest.Config):
    """Tell jax, by the environment, where to run and what XLA should do.

    Let the processes of this run, and the next runs, share what it compiled: that takes
    most of the time of the tests.  A program from the cache is the one that was
    compiled, so its results have the same bits; `pytest --cache-clear` drops it.  Only
    with a size limit does jax lock the cache against other processes.
    """
    directory = config.rootpath / ".pytest_cache" / "d" / "jax"
    # `make test-gpu` sets it to cuda,cpu.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # Not before that: jaxtyping's hook imports jax with the first module of ours.
    from ds4jax import xla_flags

    xla_flags.set_flags()
    quick = QUICK if config.option.markexpr == "not optimised" else []
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([flags, *ALONE, *quick])


@pytest.fixture(scope="module", autouse=True)
def _forget_programs(request: pytest.FixtureRequest):
    """Let go of all programs when a file is done and they fill the memory.

    Files that follow each other share them otherwise, but for those that patch: what
    was traced before would not be patched, nor what is traced then be right later.
    """
    patches = any(
        item.path == request.path and "monkeypatch" in getattr(item, "fixturenames", ())
        for item in request.session.items
    )
    if patches:
        _clear()
    yield
    if patches or _resident() > ENOUGH:
        _clear()


def _clear():
    """Forget what is traced and compiled, and give the memory back."""
    import jax

    jax.clear_caches()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident() -> float:
    """Return the bytes of memory of this process, infinite where nothing says."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def model():
    """Return the micro model of most tests of decoding; some have one of their own."""
    import models

    return models.lively(models.micro_config())


def pytest_collection_finish():
    """Look for no garbage among what was imported: that is most of all there is."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    chosen = config.option.markexpr
    for item in items:
        if item.get_closest_marker("heavy") and "heavy" not in chosen:
            item.add_marker(pytest.mark.skip(reason="heavy: run with -m heavy"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


def _has_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"
