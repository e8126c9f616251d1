"""Write GGUF files of random weights, to measure speed and memory with.

    ds4jax synth --shape=flash --plan=ds4-q2 --layers=4 --out=trunk.gguf

The files have the layout of real ones: names, shapes, types and metadata.  What such a
model writes means nothing, and it accepts no draft; there is no tokenizer either, so
it takes token ids.  Tensors are made one at a time and both files appear when both are
complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, schema, synthetic
from ds4jax.config import PLANS, ModelConfig, QuantPlan, mtp_plan
from ds4jax.errors import ConfigError
from ds4jax.files import check_place, replacing

_SHAPES = {"flash": ModelConfig.flash, "tiny": ModelConfig.tiny}

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
_OUT = flags.DEFINE_string("out", None, "Trunk file to write.", required=True)
_MTP_OUT = flags.DEFINE_string(
    "mtp_out", None, "File to write for the MTP block; without it none is written."
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
    jobs = [(Path(_OUT.value), _PLAN.value, False)]
    if _MTP_OUT.value is not None:
        path = Path(_MTP_OUT.value)
        if path.resolve() == jobs[0][0].resolve():
            raise ConfigError(f"--mtp_out={path}: expected another file than --out")
        jobs.append((path, mtp_plan(_PLAN.value), True))
    for path, *_ in jobs:
        check_place(path)
    with contextlib.ExitStack() as stack:
        # Each is moved into place as the stack unwinds, if all are written.
        parts = [stack.enter_context(replacing(path)) for path, *_ in jobs]
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
