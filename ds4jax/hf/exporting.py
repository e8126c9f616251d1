"""A model as transformers' classes take it: the way back of `architecture` and `names`.

The MTP block is not among them: transformers has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.hf.architecture import INTEGERS, NUMBERS
from ds4jax.hf.names import pieces

_CSA, _HCA = "compressed_sparse_attention", "heavily_compressed_attention"
# What transformers' layout says with lists of layer kinds and a share of the channels.
_DERIVED = ("qk_rope_head_dim", "num_hash_layers")


def settings(config: ModelConfig) -> dict[str, Any]:
    """Return the architecture in transformers' layout of `config.json`.

    Raises:
      ConfigError: for numerics that transformers does not have: ds4's rounding of the
        cache, or more than one ratio beside that of CSA.
    """
    if config.kv_rounding != "none":
        raise ConfigError(
            "kv_rounding: expected 'none', which is all that transformers computes,"
            f" found {config.kv_rounding!r}"
        )
    others = set(config.compress_ratios) - {0, CSA_RATIO}
    if len(others) > 1:
        raise ConfigError(
            f"compress_ratios: expected 0, {CSA_RATIO} and one more,"
            f" found {config.compress_ratios}"
        )
    kinds = {0: "sliding_attention", CSA_RATIO: _CSA} | dict.fromkeys(others, _HCA)
    rates = {kinds[ratio]: ratio for ratio in sorted({CSA_RATIO} | others)}
    hashed = config.hash_layers
    fields = {
        key: getattr(config, name) for name, key in {**INTEGERS, **NUMBERS}.items()
    }
    return {key: value for key, value in fields.items() if key not in _DERIVED} | {
        "model_type": "deepseek_v4",
        "layer_types": [kinds[ratio] for ratio in config.compress_ratios],
        "compress_rates": rates,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (config.layers - hashed),
        "partial_rotary_factor": config.rope_dim / config.head_dim,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_original_context,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
        },
    }


def state(
    names: Iterable[str], weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a model's weights under the names of transformers' modules.

    Args:
      names: of the module's state dictionary; any spelling of `names` whose experts
        are in one tensor will do.
      weights: values by GGUF name, in `schema`'s shapes.

    Raises:
      ConfigError: for a name that means no tensor.
    """

    def one(name: str) -> np.ndarray:
        parts = pieces(name)
        if not parts or parts[0].expert is not None:
            raise ConfigError(f"{name}: expected a tensor of transformers' DeepSeek-V4")
        values = [np.asarray(weights[part.gguf]) for part in parts]
        return values[0] if len(values) == 1 else np.concatenate(values, axis=1)

    return {name: one(name) for name in names}
