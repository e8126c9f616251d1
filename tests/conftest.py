"""What every test gets: the CPU, unless a GPU run asks otherwise, and the markers."""

import os

import pytest

# Before anything imports jax.  `make test-gpu` sets it to cuda,cpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


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
