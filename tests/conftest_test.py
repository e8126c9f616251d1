"""What `conftest.py` sets up, where nothing else would notice that it is missing."""

import os

import jax
import pytest


@pytest.mark.parametrize("name", ["jax_platforms", "jax_compilation_cache_dir"])
def test_jax_looks_at_the_environment(name):
    """Seen red without xdist's workers, which inherit it, where jax came first."""
    found = jax.config.values[name]
    assert found and found == os.environ[name.upper()]
