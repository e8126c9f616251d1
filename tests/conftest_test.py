"""What `conftest.py` sets up, where nothing else would notice that it is missing."""

import os

import jax


def test_programs_that_xla_compiled_are_kept():
    """Seen red where jax, imported by then, was told by the environment alone."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    assert directory and directory == os.environ["JAX_COMPILATION_CACHE_DIR"]
