"""`config.json` of a DeepSeek-V4 checkpoint as a `ModelConfig`.

Both layouts are read: the official one (flat, `compress_ratios`, `num_hash_layers`,
`rope_scaling`) and transformers' (`layer_types`, `mlp_layer_types`, nested
`rope_parameters`), by turning the second into the first.  Nothing is guessed: a key
that is missing is an error, and so are two that contradict each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.config import CSA_RATIO, ModelConfig
from ds4jax.errors import ConfigError, FileError

INTEGERS = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "rope_dim": "qk_rope_head_dim",
    "q_lora": "q_lora_rank",
    "o_lora": "o_lora_rank",
    "o_groups": "o_groups",
    "window": "sliding_window",
    "index_heads": "index_n_heads",
    "index_dim": "index_head_dim",
    "index_topk": "index_topk",
    "experts": "n_routed_experts",
    "experts_used": "num_experts_per_tok",
    "expert_ffn": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "hc_streams": "hc_mult",
    "sinkhorn_iters": "hc_sinkhorn_iters",
    "hash_layers": "num_hash_layers",
}
"""Fields of `ModelConfig` and their keys in the official layout."""
NUMBERS = {
    "routed_scale": "routed_scaling_factor",
    "hc_eps": "hc_eps",
    "rms_eps": "rms_norm_eps",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
}
"""As `INTEGERS`, of the numbers."""
# What the model computes whatever the file says: a file that says otherwise is refused.
_FIXED = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def config(source: Mapping[str, Any] | str | os.PathLike[str]) -> ModelConfig:
    """Return the architecture that a `config.json`, or its content, describes.

    Raises:
      FileError: if the file is not there or not a JSON object.
      ConfigError: for a key that is missing, contradictory or not supported.
    """
    if isinstance(source, Mapping):
        return _read(_Keys("config.json", source))
    try:
        content = json.loads(Path(source).read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{source}: expected a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{source}: expected a JSON object, found {content!r:.40}")
    return _read(_Keys(str(source), content))


class _Keys:
    """A JSON object whose every refusal names the file and the key."""

    def __init__(self, where: str, content: Mapping[str, Any]):
        self.where = where
        self.content = dict(content)

    def refuse(self, key: str, expected: object) -> ConfigError:
        found = repr(self.content[key]) if key in self.content else "no such key"
        return ConfigError(f"{self.where}: {key}: expected {expected}, found {found}")

    def integer(self, key: str) -> int:
        value = self.content.get(key)
        if type(value) is not int:
            raise self.refuse(key, "an integer")
        return value

    def number(self, key: str) -> float:
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, "a number")
        return float(value)

    def sequence(self, key: str) -> list:
        value = self.content.get(key)
        if not isinstance(value, list):
            raise self.refuse(key, "a list with one entry per layer")
        return value

    def inner(self, key: str) -> _Keys:
        value = self.content.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return _Keys(f"{self.where}: {key}", value)

    def fixed(self, key: str, value: object):
        if self.content.get(key, value) != value:
            raise self.refuse(key, f"{value!r}, the only one supported")

    def derive(self, key: str, value: object, source: str):
        """Set a key of the official layout; one that is there already must agree."""
        if self.content.setdefault(key, value) != value:
            raise self.refuse(key, f"{value!r}, which follows from {source}")


def _read(keys: _Keys) -> ModelConfig:
    """Return the architecture of a `config.json` in either layout."""
    if "model_type" not in keys.content:
        raise keys.refuse("model_type", "'deepseek_v4'")
    for key, value in _FIXED.items():
        keys.fixed(key, value)
    _layers_to_official(keys)
    _rotary_to_official(keys)
    layers = keys.integer("num_hidden_layers")
    ratios = keys.sequence("compress_ratios")
    # The official list goes on past the trunk with the ratios of the MTP block.
    if any(ratios[layers:]):
        raise keys.refuse("compress_ratios", f"0 from entry {layers} on (MTP)")
    yarn = keys.inner("rope_scaling")
    yarn.fixed("attention_factor", 1.0)
    kind = "type" if "type" in yarn.content else "rope_type"
    if yarn.content.get(kind) != "yarn":
        raise yarn.refuse(kind, "'yarn', the only one supported")
    fields = {
        **{name: keys.integer(key) for name, key in INTEGERS.items()},
        **{name: keys.number(key) for name, key in NUMBERS.items()},
        "compress_ratios": tuple(ratios[:layers]),
        "yarn_factor": yarn.number("factor"),
        "yarn_original_context": yarn.integer("original_max_position_embeddings"),
        "yarn_beta_fast": yarn.number("beta_fast"),
        "yarn_beta_slow": yarn.number("beta_slow"),
    }
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{keys.where}: {error}") from error


def _layers_to_official(keys: _Keys):
    """Turn transformers' two lists of layer kinds into ratios and a count."""
    if "layer_types" in keys.content:
        rates = {"sliding_attention": 0}
        if any(kind != "sliding_attention" for kind in keys.sequence("layer_types")):
            inner = keys.inner("compress_rates")
            csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
            inner.fixed(csa, CSA_RATIO)
            rates |= {csa: CSA_RATIO, hca: inner.integer(hca)}
            if rates[hca] in (0, CSA_RATIO):
                raise inner.refuse(hca, f"neither 0 nor {CSA_RATIO}")
        kinds = keys.sequence("layer_types")
        if not all(kind in rates for kind in kinds):
            raise keys.refuse("layer_types", f"entries among {', '.join(rates)}")
        ratios = [rates[kind] for kind in kinds]
        given = keys.content.get("compress_ratios", ratios)
        if not isinstance(given, list) or given[: len(ratios)] != ratios:
            raise keys.refuse("compress_ratios", f"{ratios}, as in layer_types")
        keys.content["compress_ratios"] = given
    if "mlp_layer_types" in keys.content:
        kinds = keys.sequence("mlp_layer_types")
        hashed = kinds.count("hash_moe")
        layers = keys.integer("num_hidden_layers")
        if kinds != ["hash_moe"] * hashed + ["moe"] * (layers - hashed):
            raise keys.refuse("mlp_layer_types", f"hash_moe, then moe, {layers} in all")
        keys.derive("num_hash_layers", hashed, "mlp_layer_types")


def _rotary_to_official(keys: _Keys):
    """Turn transformers' `rope_parameters` into two bases, a width and YaRN."""
    holders = [keys]
    if "rope_parameters" in keys.content:
        rope = keys.inner("rope_parameters")
        if "rope_scaling" in keys.content:
            raise keys.refuse("rope_scaling", "no such key beside rope_parameters")
        yarn = rope
        if "compress" in rope.content:
            main, yarn = rope.inner("main"), rope.inner("compress")
            main.fixed("rope_type", "default")
            keys.derive("rope_theta", main.number("rope_theta"), "rope_parameters")
            theta = yarn.number("rope_theta")
            keys.derive("compress_rope_theta", theta, "rope_parameters")
            holders += [main, yarn]
        keys.content["rope_scaling"] = yarn.content
    for holder in holders:
        if "partial_rotary_factor" in holder.content:
            width = int(
                keys.integer("head_dim") * holder.number("partial_rotary_factor")
            )
            keys.derive("qk_rope_head_dim", width, "partial_rotary_factor")
