"""Host memory while a file is loaded, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds4jax import gguf, schema, synthetic
from ds4jax.config import PLANS, ModelConfig

PROGRAM = Path(__file__).with_name("loading_memory.py")
SLACK = 8e6
"""What the allocator and Python keep beside tensors."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_loading_holds_one_tensor_beside_the_device_weights(tmp_path):
    """On the CPU the device's memory is anonymous too.

    The second figure, of a loader that packs the whole file before any of it is placed,
    shows that the first could fail.
    """
    config = ModelConfig.tiny(
        vocab=256, hidden=1024, layers=1, compress_ratios=(0,), experts=64,
        expert_ffn=1024, hash_layers=1,
    )  # fmt: skip
    plan, path = PLANS["ds4-q4"], tmp_path / "t.gguf"
    weights = synthetic.weights(config, plan)
    on_device = sum(w.nbytes for w in weights.values())
    largest = max(w.nbytes for w in weights.values())
    specs = schema.trunk(config)
    layout = {n: (spec.shape, plan.types[spec.group]) for n, spec in specs.items()}
    stored = lambda name: [synthetic.stored(weights[name])]  # noqa: E731
    gguf.write_stored(path, gguf.metadata(config), layout, stored)
    assert 3 * largest < on_device
    run = subprocess.run(
        [sys.executable, PROGRAM, path],
        # What is let go of goes back to the system at once.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    placed, packed_first = map(int, run.stdout.split())
    limit = on_device + largest + SLACK
    assert placed < limit < packed_first
