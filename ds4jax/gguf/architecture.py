"""`deepseek4.*` metadata: from a file to a `ModelConfig`, and back.

The keys are those that ds4 requires (antirez/ds4 `ds4.c`, its metadata validator).  A
number may be stored in any width; ds4 itself wants u32 integers and f32, which is what
`metadata` makes a writer store.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import numpy as np

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, FileError
from ds4jax.gguf.container import GGUF

ARCHITECTURE = "deepseek4"

_INTEGERS = {
    "vocab": "vocab_size",
    "hidden": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "rope_dim": "rope.dimension_count",
    "q_lora": "attention.q_lora_rank",
    "o_lora": "attention.output_lora_rank",
    "o_groups": "attention.output_group_count",
    "window": "attention.sliding_window",
    "index_heads": "attention.indexer.head_count",
    "index_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "experts": "expert_count",
    "experts_used": "expert_used_count",
    "expert_ffn": "expert_feed_forward_length",
    "shared_experts": "expert_shared_count",
    "hash_layers": "hash_layer_count",
    "hc_streams": "hyper_connection.count",
    "sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
    "yarn_original_context": "rope.scaling.original_context_length",
}

_FLOATS = {
    "routed_scale": "expert_weights_scale",
    "hc_eps": "hyper_connection.epsilon",
    "rms_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "compress_rope_theta": "attention.compress_rope_freq_base",
    "yarn_factor": "rope.scaling.factor",
    "yarn_beta_fast": "rope.scaling.yarn_beta_fast",
    "yarn_beta_slow": "rope.scaling.yarn_beta_slow",
}


def config(file: GGUF) -> ModelConfig:
    """Return the architecture that a trunk's metadata describes.

    What is not architecture (`kv_rounding`, `dtype`) has its default.

    Raises:
      FileError: if the file is of another architecture.
      ConfigError: for a key that is missing, of a wrong type or of a wrong value.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise FileError(
            f"{file.path}: general.architecture: expected {ARCHITECTURE!r}, found"
            f" {reprlib.repr(architecture)}"
        )
    fields: dict[str, Any] = {
        name: _integer(file, key) for name, key in _INTEGERS.items()
    }
    fields |= {name: _float(file, key) for name, key in _FLOATS.items()}
    _integer(file, "attention.head_count_kv", 1)
    _integer(file, "attention.value_length", fields["head_dim"])
    for key in ("expert_group_count", "expert_group_used_count"):
        if f"{ARCHITECTURE}.{key}" in file.metadata:
            _integer(file, key, 0)
    if _value(file, "expert_weights_norm", "true") is not True:
        raise _wrong(file, "expert_weights_norm", "true")
    ratios = _per_layer(file, "attention.compress_ratios", fields["layers"], "iu")
    limits = _per_layer(file, "swiglu_clamp_exp", fields["layers"], "fiu")
    if len(set(limits)) != 1:
        raise _wrong(file, "swiglu_clamp_exp", "the same number for every layer")
    try:
        return ModelConfig(
            **fields,
            compress_ratios=tuple(ratios),
            swiglu_limit=_shortest(float(limits[0])),
        )
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Return what a file must say of a model, for `gguf.write`.

    `config` of a file that holds it gives the same architecture back.
    """
    keys: dict[str, Any] = {
        key: getattr(config, name) for name, key in _INTEGERS.items()
    }
    keys |= {key: float(getattr(config, name)) for name, key in _FLOATS.items()}
    keys |= {
        "attention.head_count_kv": 1,
        "attention.value_length": config.head_dim,
        "expert_weights_norm": True,
        "attention.compress_ratios": np.asarray(config.compress_ratios, np.int32),
        "swiglu_clamp_exp": np.full(config.layers, config.swiglu_limit, np.float32),
        "context_length": np.uint64(config.yarn_original_context * config.yarn_factor),
    }
    return {
        "general.architecture": ARCHITECTURE,
        **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()},
    }


def _value(file: GGUF, key: str, expected: Any) -> Any:
    if f"{ARCHITECTURE}.{key}" not in file.metadata:
        raise ConfigError(
            f"{file.path}: required metadata key {ARCHITECTURE}.{key} is missing:"
            f" expected {expected}"
        )
    return file.metadata[f"{ARCHITECTURE}.{key}"]


def _wrong(file: GGUF, key: str, expected: Any) -> ConfigError:
    value = file.metadata[f"{ARCHITECTURE}.{key}"]
    if isinstance(value, (np.ndarray, list)):
        kind = value.dtype if isinstance(value, np.ndarray) else "string"
        found = f"a list of {len(value)} x {kind}"
    else:
        found = reprlib.repr(value)
    return ConfigError(
        f"{file.path}: metadata key {ARCHITECTURE}.{key}: expected {expected}, found"
        f" {found}"
    )


def _integer(file: GGUF, key: str, wanted: int | None = None) -> int:
    expected = "a non-negative integer" if wanted is None else wanted
    value = _value(file, key, expected)
    if type(value) is not int or value < 0 or wanted not in (None, value):
        raise _wrong(file, key, expected)
    return value


def _float(file: GGUF, key: str) -> float:
    value = _value(file, key, "a number")
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise _wrong(file, key, "a positive number")
    return _shortest(float(value))


def _per_layer(file: GGUF, key: str, layers: int, kinds: str) -> list[Any]:
    """Return the first `layers` items of a list of numpy dtype kinds `kinds`.

    A file with an MTP block in its count may list that block too.
    """
    expected = (
        f"a list of at least {layers} {'numbers' if 'f' in kinds else 'integers'}"
    )
    value = _value(file, key, expected)
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind not in kinds
        or len(value) < layers
    ):
        raise _wrong(file, key, expected)
    return value[:layers].tolist()


def _shortest(value: float) -> float:
    """Return the shortest decimal of a float32, so that 1e-6 is read as 1e-6."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
