"""What the commands that make random weights share: which layout they have.

A command gets the flags with `flags.adopt_module_key_flags(synth_flags)`.
"""

from __future__ import annotations

from absl import flags

from ds4jax import synthetic
from ds4jax.config import PLANS, ModelConfig

SHAPES = {"flash": ModelConfig.flash, "tiny": ModelConfig.tiny}
"""DeepSeek-V4-Flash, and the model that ships."""

_PLAN = flags.DEFINE_enum(
    "plan",
    "ds4-q2",
    list(PLANS),
    "Types of the matrices, as of `ds4jax convert`: ds4-q2 and ds4-q4 are ds4's own.",
)
_LAYERS = flags.DEFINE_integer(
    "layers", None, "Leading layers to keep; all by default.", lower_bound=1
)


def config(shape: str) -> ModelConfig:
    """Return the architecture of one of SHAPES, cut to --layers.

    Raises:
      ConfigError: for more layers than it has.
    """
    whole = SHAPES[shape]()
    return whole if _LAYERS.value is None else synthetic.shorten(whole, _LAYERS.value)


def plan() -> str:
    """Return the name of the trunk's plan."""
    return _PLAN.value


def given() -> list[str]:
    """Return the names of those of the flags that are on the command line."""
    return [flag.name for flag in (_PLAN, _LAYERS) if flag.present]
