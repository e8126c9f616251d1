"""The flag without which XLA may compile one computation to different bits.

On a GPU it otherwise times several ways to compute a product and takes the fastest, so
two programs, or one compiled twice, may sum in different orders.  (There is a flag for
deterministic operations too.  What that changes here is scattering into caches, whose
places differ anyway, and it takes a sort for each.)
"""

from __future__ import annotations

import os

SAME_BITS = "--xla_gpu_autotune_level=0"


def set_flags():
    """Add it to XLA_FLAGS, unless it is set there; to be called before JAX starts."""
    given = os.environ.get("XLA_FLAGS", "")
    if SAME_BITS.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {SAME_BITS}".strip()
