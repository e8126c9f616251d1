"""XLA's flags: the same bits every time, and what its defaults leave slow.

On a GPU it otherwise times several ways to compute a product and takes the fastest, so
two programs, or one compiled twice, may sum in different orders.  (There is a flag for
deterministic operations too.  What that changes here is scattering into caches, whose
places differ anyway, and it takes a sort for each.)

It also launches one kernel after the other.  Launches that need nothing of each other,
as the shared expert's and the routed ones', run side by side instead: which is no
question of bits, and a tenth of a pass.

On a CPU jax 0.10 fuses for YNNPACK, with which a pass of the exact class takes a third
longer than with XLA's own fusions, and prefill too.  Products that are fused with
nothing it is to have all the same: of two rows they take half as long there.
"""

from __future__ import annotations

import os

FLAGS = {
    "--xla_gpu_autotune_level": "0",
    "--xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "--xla_cpu_experimental_ynn_fusion_type": "individual_dot",
}


def set_flags():
    """Add those not set there to XLA_FLAGS; to be called before JAX starts."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = (f"{name}={value}" for name, value in FLAGS.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
