"""Every tensor of a trunk and of an MTP file: its name, shape and permitted types.

The names are those of ds4's GGUF files (antirez/ds4 `ds4.c`, its strict validator) and
are the names by which the whole package knows a weight: a model is built from a
mapping of them, and `gguf.py` and `hf.py` read and write such mappings.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from ds4jax.config import ModelConfig

Group = Literal["dense", "plain", "experts", "down", "vector", "table"]

MATRIX_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "MXFP4",
)  # fmt: skip
"""ggml types that a matrix may have; all of them dequantise bit-exactly."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a file must hold under one name.

    Attributes:
      shape: numpy order, slowest axis first: `[out, in]` for a matrix.
      group: which entry of a `QuantPlan` gives its type; `vector` is F32, `table` I32.
    """

    shape: tuple[int, ...]
    group: Group

    @property
    def types(self) -> tuple[str, ...]:
        """Return the ggml types that a reader accepts."""
        return {"vector": ("F32",), "table": ("I32",)}.get(self.group, MATRIX_TYPES)

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)


def _block(config: ModelConfig, prefix: str) -> dict[str, TensorSpec]:
    """Return what every layer has, whatever its attention and routing."""
    c = config
    mix = 2 * c.hc_streams + c.hc_streams**2
    heads_out = c.heads * c.head_dim
    specs = {}
    for name in ("attn", "ffn"):
        specs[f"hc_{name}_fn.weight"] = ((mix, c.hc_streams * c.hidden), "plain")
        specs[f"hc_{name}_scale.weight"] = ((3,), "vector")
        specs[f"hc_{name}_base.weight"] = ((mix,), "vector")
        specs[f"{name}_norm.weight"] = ((c.hidden,), "vector")
    specs |= {
        "attn_q_a.weight": ((c.q_lora, c.hidden), "dense"),
        "attn_q_a_norm.weight": ((c.q_lora,), "vector"),
        "attn_q_b.weight": ((heads_out, c.q_lora), "dense"),
        "attn_kv.weight": ((c.head_dim, c.hidden), "dense"),
        "attn_kv_a_norm.weight": ((c.head_dim,), "vector"),
        "attn_sinks.weight": ((c.heads,), "vector"),
        "attn_output_a.weight": (
            (c.o_groups * c.o_lora, heads_out // c.o_groups),
            "dense",
        ),
        "attn_output_b.weight": ((c.hidden, c.o_groups * c.o_lora), "dense"),
        "ffn_gate_inp.weight": ((c.experts, c.hidden), "plain"),
        "ffn_gate_exps.weight": ((c.experts, c.expert_ffn, c.hidden), "experts"),
        "ffn_up_exps.weight": ((c.experts, c.expert_ffn, c.hidden), "experts"),
        "ffn_down_exps.weight": ((c.experts, c.hidden, c.expert_ffn), "down"),
        "ffn_gate_shexp.weight": ((c.expert_ffn, c.hidden), "dense"),
        "ffn_up_shexp.weight": ((c.expert_ffn, c.hidden), "dense"),
        "ffn_down_shexp.weight": ((c.hidden, c.expert_ffn), "dense"),
    }
    return {prefix + name: TensorSpec(*spec) for name, spec in specs.items()}


def _compressor(
    config: ModelConfig, prefix: str, ratio: int, width: int
) -> dict[str, TensorSpec]:
    c = config
    halves = 2 if ratio == 4 else 1
    specs = {
        "kv.weight": ((halves * width, c.hidden), "plain"),
        "gate.weight": ((halves * width, c.hidden), "plain"),
        "ape.weight": ((ratio, halves * width), "plain"),
        "norm.weight": ((width,), "vector"),
    }
    return {prefix + name: TensorSpec(*spec) for name, spec in specs.items()}


def _head(config: ModelConfig, prefix: str, norm: str) -> dict[str, TensorSpec]:
    streams = config.hc_streams
    return {
        f"{prefix}fn.weight": TensorSpec((streams, streams * config.hidden), "plain"),
        f"{prefix}base.weight": TensorSpec((streams,), "vector"),
        f"{prefix}scale.weight": TensorSpec((1,), "vector"),
        norm: TensorSpec((config.hidden,), "vector"),
    }


def neutral(config: ModelConfig, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 values of a vector that leave a model as it is.

    Norms and scales are 1; sinks and biases 0; the hyper-connections mix each stream
    with itself.
    """
    values = np.zeros(shape, np.float32)
    if "norm" in name or name.endswith("scale.weight"):
        values[:] = 1
    streams = config.hc_streams
    if name.endswith("base.weight") and len(values) > streams:
        values[2 * streams :] = 4 * np.eye(streams).reshape(-1)
    return values


def trunk(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return the tensors of a trunk file, by name."""
    c = config
    specs = {
        "token_embd.weight": TensorSpec((c.vocab, c.hidden), "plain"),
        "output.weight": TensorSpec((c.vocab, c.hidden), "dense"),
        **_head(c, "output_hc_", "output_norm.weight"),
    }
    for layer, ratio in enumerate(c.compress_ratios):
        blk = f"blk.{layer}."
        specs |= _block(c, blk)
        if ratio:
            specs |= _compressor(c, f"{blk}attn_compressor_", ratio, c.head_dim)
        if c.is_csa(layer):
            specs |= _compressor(c, f"{blk}indexer_compressor_", ratio, c.index_dim)
            specs[f"{blk}indexer.attn_q_b.weight"] = TensorSpec(
                (c.index_heads * c.index_dim, c.q_lora), "plain"
            )
            specs[f"{blk}indexer.proj.weight"] = TensorSpec(
                (c.index_heads, c.hidden), "plain"
            )
        if layer < c.hash_layers:
            specs[f"{blk}ffn_gate_tid2eid.weight"] = TensorSpec(
                (c.vocab, c.experts_used), "table"
            )
        else:
            specs[f"{blk}exp_probs_b.bias"] = TensorSpec((c.experts,), "vector")
    return specs


def mtp(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return the tensors of an MTP file, by name."""
    c = config
    return {
        "mtp.0.e_proj.weight": TensorSpec((c.hidden, c.hidden), "dense"),
        "mtp.0.h_proj.weight": TensorSpec((c.hidden, c.hidden), "dense"),
        "mtp.0.enorm.weight": TensorSpec((c.hidden,), "vector"),
        "mtp.0.hnorm.weight": TensorSpec((c.hidden,), "vector"),
        **_head(c, "mtp.0.hc_head_", "mtp.0.norm.weight"),
        **_block(c, "mtp.0."),
        "mtp.0.exp_probs_b.bias": TensorSpec((c.experts,), "vector"),
    }
