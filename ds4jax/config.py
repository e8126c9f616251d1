"""Hyper-parameters of a DeepSeek-V4 model, and the ggml types its file is written in.

`ModelConfig` is frozen and validated, so it can be a static jit argument.  Nothing
elsewhere in the package is hard-coded to Flash.  Readers for GGUF metadata and for a
Hugging Face `config.json` live in `gguf` and `hf`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from ds4jax.errors import ConfigError, expect

CSA_RATIO = 4
"""The compress ratio that brings overlapping windows and an indexer (paper: CSA)."""

KvRounding = Literal["none", "ds4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the trunk and its MTP block, and two numeric switches.

    Attributes:
      vocab: V, size of the vocabulary.
      hidden: D, width of one stream.
      layers: L, trunk layers.
      heads: H, query heads (there is one shared key = value head).
      head_dim: K, width of a head.
      rope_dim: R, rotary channels, the last R of each head.
      q_lora: Q, rank of the query projection.
      o_lora: rank of each group of the output projection.
      o_groups: G, groups of the output projection.
      window: raw rows a query sees, itself included.
      compress_ratios: per layer 0 (dense), 4 (CSA: overlapping, with indexer) or
        another ratio (HCA: disjoint windows).
      index_heads, index_dim, index_topk: the Lightning indexer.
      experts, experts_used, expert_ffn, shared_experts: the MoE.
      routed_scale: factor on the normalised routing weights.
      hash_layers: leading layers routed by a token table.
      hc_streams, sinkhorn_iters, hc_eps: hyper connections.
      rms_eps: epsilon of every RMS norm.
      swiglu_limit: clamp of the SwiGLU in routed and shared experts.
      rope_theta: rotary base of dense layers.
      compress_rope_theta: rotary base of CSA and HCA layers, which also use YaRN.
      yarn_factor, yarn_original_context, yarn_beta_fast, yarn_beta_slow: YaRN.
      kv_rounding: `ds4` simulates ds4's cache rounding (FP8 on raw and compressed
        rows, Hadamard + FP4 in the indexer, F16 cache rows); `none` leaves it out.
      dtype: operand type of the matrix products, `float32` or `bfloat16`; they
        accumulate in float32 either way.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    rope_dim: int
    q_lora: int
    o_lora: int
    o_groups: int
    window: int
    compress_ratios: tuple[int, ...]
    index_heads: int
    index_dim: int
    index_topk: int
    experts: int
    experts_used: int
    expert_ffn: int
    shared_experts: int = 1
    routed_scale: float = 1.5
    hash_layers: int = 3
    hc_streams: int = 4
    sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_eps: float = 1e-6
    swiglu_limit: float = 10.0
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn_factor: float = 16.0
    yarn_original_context: int = 65536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    kv_rounding: KvRounding = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 0):
                raise ConfigError(
                    f"{field.name}: expected a non-negative integer, found {value!r}"
                )
            if field.type == "float" and not (
                type(value) in (int, float) and 0 < value <= sys.float_info.max
            ):
                raise ConfigError(
                    f"{field.name}: expected a positive number, found {value!r}"
                )
        for name in ("vocab", "hidden", "layers", "heads", "head_dim", "q_lora",
                     "o_lora", "o_groups", "window", "experts", "experts_used",
                     "expert_ffn", "hc_streams", "sinkhorn_iters",
                     "yarn_original_context"):  # fmt: skip
            self._expect(name, getattr(self, name) > 0, "at least 1")
        self._expect(
            "compress_ratios",
            isinstance(self.compress_ratios, tuple)
            and len(self.compress_ratios) == self.layers
            and all(type(r) is int and r >= 0 for r in self.compress_ratios),
            f"{self.layers} non-negative integers in a tuple, one per layer",
        )
        self._expect(
            "rope_dim",
            0 < self.rope_dim <= self.head_dim and self.rope_dim % 2 == 0,
            f"an even number in 2..{self.head_dim}",
        )
        self._expect(
            "o_groups", self.heads % self.o_groups == 0, f"a divisor of {self.heads}"
        )
        self._expect(
            "experts_used", self.experts_used <= self.experts, f"<= {self.experts}"
        )
        self._expect("hash_layers", self.hash_layers <= self.layers, "<= layers")
        self._expect("shared_experts", self.shared_experts == 1, "1")
        self._expect(
            "kv_rounding", self.kv_rounding in ("none", "ds4"), "'none' or 'ds4'"
        )
        self._expect(
            "dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"
        )
        self._expect("compress_rope_theta", self.compress_rope_theta > 1, "above 1")
        if CSA_RATIO in self.compress_ratios:
            self._expect("index_heads", self.index_heads > 0, "at least 1")
            self._expect("index_topk", self.index_topk > 0, "at least 1")
            self._expect(
                "index_dim",
                self.index_dim >= self.rope_dim,
                f"at least rope_dim = {self.rope_dim}",
            )
        if self.kv_rounding == "ds4":
            self._expect(
                "head_dim",
                (self.head_dim - self.rope_dim) % 64 == 0,
                "head_dim - rope_dim a multiple of 64 (FP8 blocks of kv_rounding=ds4)",
            )
            if CSA_RATIO in self.compress_ratios:
                self._expect(
                    "index_dim",
                    self.index_dim % 32 == 0 and self.index_dim.bit_count() == 1,
                    "a power of two >= 32 (Hadamard and FP4 of kv_rounding=ds4)",
                )

    def _expect(self, name: str, holds: bool, expected: str):
        expect(name, holds, expected, getattr(self, name))

    @classmethod
    def flash(cls, **changes) -> ModelConfig:
        """Return DeepSeek-V4-Flash (ARCHITECTURE: 43 layers, 0 0 4 128 4 128 ... 4)."""
        flash: dict[str, Any] = dict(
            vocab=129280, hidden=4096, layers=43, heads=64, head_dim=512, rope_dim=64,
            q_lora=1024, o_lora=1024, o_groups=8, window=128,
            compress_ratios=(0, 0, *(4 if i % 2 == 0 else 128 for i in range(2, 43))),
            index_heads=64, index_dim=128, index_topk=512,
            experts=256, experts_used=6, expert_ffn=2048,
        )  # fmt: skip
        return cls(**(flash | changes))

    @classmethod
    def tiny(cls, **changes) -> ModelConfig:
        """Return the trained model that ships: every layer kind, widths of 256."""
        tiny: dict[str, Any] = dict(
            vocab=4096, hidden=256, layers=6, heads=8, head_dim=128, rope_dim=64,
            q_lora=256, o_lora=64, o_groups=4, window=256,
            compress_ratios=(0, 0, 4, 128, 4, 128),
            index_heads=4, index_dim=128, index_topk=64,
            experts=12, experts_used=2, expert_ffn=512, hash_layers=2,
        )  # fmt: skip
        return cls(**(tiny | changes))

    def is_csa(self, layer: int) -> bool:
        """Say whether trunk layer `layer` has overlapping windows and an indexer."""
        return self.compress_ratios[layer] == CSA_RATIO


@dataclasses.dataclass(frozen=True)
class QuantPlan:
    """The ggml type of each group of matrices in a file that ds4jax writes.

    Vectors (norms, sinks, bases, scales, biases) are always F32 and the hash table
    I32, as ds4 requires.

    Attributes:
      dense: attention, shared experts, LM head, MTP projections.
      plain: embedding, hyper-connection maps, router, compressors, indexer.
      experts: gate and up matrices of the routed experts.
      down: down matrices of the routed experts.
    """

    dense: str
    plain: str
    experts: str
    down: str

    @property
    def types(self) -> dict[str, str]:
        """Return the ggml type of each group of `schema.TensorSpec`."""
        return {**vars(self), "vector": "F32", "table": "I32"}

    @classmethod
    def named(cls, name: str) -> QuantPlan:
        """Return one of PLANS.

        Raises:
          ConfigError: for any other name.
        """
        if name not in PLANS:
            raise ConfigError(
                f"plan: expected one of {', '.join(PLANS)}, found {name!r}"
            )
        return PLANS[name]


PLANS = {
    "f32": QuantPlan("F32", "F32", "F32", "F32"),
    "f16": QuantPlan("F16", "F16", "F16", "F16"),
    "q8_0": QuantPlan("Q8_0", "F16", "Q8_0", "Q8_0"),
    "ds4-q2": QuantPlan("Q8_0", "F16", "IQ2_XXS", "Q2_K"),
    "ds4-q4": QuantPlan("Q8_0", "F16", "Q4_K", "Q4_K"),
    "mtp-q4": QuantPlan("Q8_0", "F32", "Q4_K", "Q4_K"),
}
"""By name; `ds4-q2`, `ds4-q4` and `mtp-q4` are the layouts of the files that ds4's
author publishes, the last of them of the MTP block that goes with either trunk."""


def mtp_plan(name: str) -> str:
    """Return the name of the plan for the MTP block of a trunk with plan `name`."""
    return "mtp-q4" if name.startswith("ds4-") else name
