"""Make random weights, to measure speed and memory with: GGUF files, or on the device.

    ds4jax synth --shape=flash --plan=ds4-q2 --layers=4 --out=trunk.gguf
    ds4jax synth --shape=flash --plan=ds4-q2 --layers=4 --device --head

The files have the layout of real ones: names, shapes, types and metadata.  What such a
model writes means nothing, and it accepts no draft; there is no tokenizer either, so
it takes token ids.  Tensors are made one at a time and both files appear when both are
complete.

--device makes the same bits without a file, and tells how long that took, compilation
included, and how much memory.  `ds4jax bench --synth` runs such a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan, mtp_plan
from ds4jax.errors import ConfigError
from ds4jax.experiments import model_flags, pair_flags, synth_device, synth_flags

flags.adopt_module_key_flags(pair_flags)
flags.adopt_module_key_flags(synth_flags)
_SHAPE = flags.DEFINE_enum(
    "shape", "flash", list(synth_flags.SHAPES),
    "DeepSeek-V4-Flash, or the model that ships.",
)  # fmt: skip
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.", lower_bound=0)
_DEVICE = flags.DEFINE_bool("device", False, "Make them on the device, and no file.")
_HEAD = flags.DEFINE_bool("head", False, "With --device, make the MTP block too.")


def main(argv: Sequence[str]):
    """Write the files that the flags name, or make the weights on the device.

    Raises:
      ConfigError: for more layers than the model has, one file for both, or flags
        that exclude each other.
      FileError: if a file cannot be written.
      CapacityError: if the device has too little memory.
    """
    del argv
    files = pair_flags.given()
    if _DEVICE.value and files:
        raise ConfigError(
            f"--{files[0]}: expected no file with --device; leave one out"
        )
    if _HEAD.value and not _DEVICE.value:
        raise ConfigError("--head: expected --device with it; --mtp_out names a file")
    config = synth_flags.config(_SHAPE.value)
    plans = synth_flags.plan(), mtp_plan(synth_flags.plan())
    if _DEVICE.value:
        _make(config, plans[: 1 + _HEAD.value])
        return
    jobs = [(pair_flags.out(), plans[0], False)]
    if (path := pair_flags.mtp_out()) is not None:
        jobs.append((path, plans[1], True))
    with pair_flags.writing([path for path, *_ in jobs]) as parts:
        for part, (path, plan, mtp) in zip(parts, jobs, strict=True):
            _write(part, path.name, config, QuantPlan.named(plan), mtp)
    for path, *_ in jobs:
        print(f"{path}: {path.stat().st_size:,} bytes")


def _make(config: ModelConfig, plans: Sequence[str]):
    """Make a trunk and, for a second plan, an MTP block; they stay until both are."""
    device, held = jax.devices()[0], []
    with model_flags.within_memory():
        for mtp, name in enumerate(plans):
            weights, made = synth_device.make(
                config, QuantPlan.named(name), _SEED.value, mtp=bool(mtp)
            )
            held.append(weights)
            print(
                f"{'MTP block' if mtp else 'trunk'}, {name}: {made} on"
                f" {device.device_kind}; {synth_device.peak(device.memory_stats())}",
                flush=True,
            )


def _write(path: Path, label: str, config: ModelConfig, plan: QuantPlan, mtp: bool):
    specs = schema.mtp(config) if mtp else schema.trunk(config)
    layout = {n: (spec.shape, plan.types[spec.group]) for n, spec in specs.items()}
    metadata = {} if mtp else gguf.metadata(config)
    with tqdm(desc=label, unit="B", unit_scale=True, disable=None) as bar:

        def content(name: str) -> list[np.ndarray]:
            weight = synthetic.tensor(
                config, name, specs[name], layout[name][1], _SEED.value
            )
            bar.update(weight.nbytes)
            return [synthetic.stored(weight)]

        gguf.write_stored(path, metadata, layout, content)
