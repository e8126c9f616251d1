"""`python -m ds4jax`: the same as the `ds4jax` command."""

import sys

from ds4jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
