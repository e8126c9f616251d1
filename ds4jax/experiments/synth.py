"""Write GGUF files of random weights, to measure speed and memory with.

    ds4jax synth --shape=flash --plan=ds4-q2 --layers=4 --out=trunk.gguf

The files have the layout of real ones: names, shapes, types and metadata.  What such a
model writes means nothing, and it accepts no draft; there is no tokenizer either, so
it takes token ids.  Tensors are made one at a time and both files appear when both are
complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, schema, synthetic
from ds4jax.config import PLANS, ModelConfig, QuantPlan, mtp_plan
from ds4jax.experiments import pair_flags

_SHAPES = {"flash": ModelConfig.flash, "tiny": ModelConfig.tiny}

flags.adopt_module_key_flags(pair_flags)
_SHAPE = flags.DEFINE_enum(
    "shape", "flash", list(_SHAPES), "DeepSeek-V4-Flash, or the model that ships."
)
_PLAN = flags.DEFINE_enum(
    "plan",
    "ds4-q2",
    list(PLANS),
    "Types of the matrices, as of `ds4jax convert`: ds4-q2 and ds4-q4 are ds4's own.",
)
_LAYERS = flags.DEFINE_integer(
    "layers", None, "Leading layers to keep; all by default.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.", lower_bound=0)


def main(argv: Sequence[str]):
    """Write the files that the flags name.

    Raises:
      ConfigError: for more layers than the model has, or one file for both.
      FileError: if a file cannot be written.
    """
    del argv
    config = _SHAPES[_SHAPE.value]()
    if _LAYERS.value is not None:
        config = synthetic.shorten(config, _LAYERS.value)
    jobs = [(pair_flags.out(), _PLAN.value, False)]
    if (path := pair_flags.mtp_out()) is not None:
        jobs.append((path, mtp_plan(_PLAN.value), True))
    with pair_flags.writing([path for path, *_ in jobs]) as parts:
        for part, (path, plan, mtp) in zip(parts, jobs, strict=True):
            _write(part, path.name, config, QuantPlan.named(plan), mtp)
    for path, *_ in jobs:
        print(f"{path}: {path.stat().st_size:,} bytes")


def _write(path: Path, label: str, config: ModelConfig, plan: QuantPlan, mtp: bool):
    specs = schema.mtp(config) if mtp else schema.trunk(config)
    layout = {n: (spec.shape, plan.types[spec.group]) for n, spec in specs.items()}
    metadata = {} if mtp else gguf.metadata(config)
    with tqdm(desc=label, unit="B", unit_scale=True, disable=None) as bar:

        def content(name: str) -> np.ndarray:
            weight = synthetic.tensor(
                config, name, specs[name], layout[name][1], _SEED.value
            )
            bar.update(weight.nbytes)
            return synthetic.stored(weight)

        gguf.write_stored(path, metadata, layout, content)
