"""XLA's flags for GPUs: the same bits every time, and launches beside each other.

XLA otherwise times several ways to compute a product and takes the fastest, so two
programs, or one compiled twice, may sum in different orders.  (There is a flag for
deterministic operations too.  What that changes here is scattering into caches, whose
places differ anyway, and it takes a sort for each.)

It also launches one kernel after the other.  Launches that need nothing of each other,
as the shared expert's and the routed ones', run side by side instead: which is no
question of bits, and a tenth of a pass.
"""

from __future__ import annotations

import os

FLAGS = {
    "--xla_gpu_autotune_level": "0",
    "--xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


def set_flags():
    """Add those not set there to XLA_FLAGS; to be called before JAX starts."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = (f"{name}={value}" for name, value in FLAGS.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
