"""The commands: one module each, started by `ds4jax NAME` (see `ds4jax.cli`)."""
