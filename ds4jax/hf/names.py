"""The spellings of DeepSeek-V4's tensors, and the GGUF names that they mean.

Three are accepted, in any mixture: the official checkpoint's
(`layers.0.attn.wq_a.weight`), that of transformers' modules
(`model.layers.0.self_attn.q_a_proj.weight`, experts fused as [w1; w3] along the output
axis) and that of transformers' saved files (`model.layers.0.attn.norm.weight`).
"""

from __future__ import annotations

import dataclasses
import re

# GGUF name: official name, then every other spelling.  Before the look-up, `self_attn.`
# and `mlp.` become `attn.` and `ffn.`, the prefix that says which layer is taken off,
# and the number of an expert becomes a star.
_TOP = {
    "token_embd.weight": ("embed.weight", "embed_tokens.weight"),
    "output.weight": ("head.weight", "lm_head.weight"),
    "output_norm.weight": ("norm.weight",),
    "output_hc_fn.weight": ("hc_head_fn", "hc_head.hc_fn"),
    "output_hc_base.weight": ("hc_head_base", "hc_head.hc_base"),
    "output_hc_scale.weight": ("hc_head_scale", "hc_head.hc_scale"),
}
_LAYER = {
    "hc_attn_fn.weight": ("hc_attn_fn", "attn_hc.fn"),
    "hc_attn_base.weight": ("hc_attn_base", "attn_hc.base"),
    "hc_attn_scale.weight": ("hc_attn_scale", "attn_hc.scale"),
    "hc_ffn_fn.weight": ("hc_ffn_fn", "ffn_hc.fn"),
    "hc_ffn_base.weight": ("hc_ffn_base", "ffn_hc.base"),
    "hc_ffn_scale.weight": ("hc_ffn_scale", "ffn_hc.scale"),
    "attn_norm.weight": ("attn_norm.weight", "input_layernorm.weight"),
    "ffn_norm.weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "attn_q_a.weight": ("attn.wq_a.weight", "attn.q_a_proj.weight"),
    "attn_q_a_norm.weight": ("attn.q_norm.weight", "attn.q_a_norm.weight"),
    "attn_q_b.weight": ("attn.wq_b.weight", "attn.q_b_proj.weight"),
    "attn_kv.weight": ("attn.wkv.weight", "attn.kv_proj.weight"),
    "attn_kv_a_norm.weight": ("attn.kv_norm.weight", "attn.norm.weight"),
    "attn_sinks.weight": ("attn.attn_sink", "attn.sinks"),
    "attn_output_a.weight": ("attn.wo_a.weight", "attn.o_a_proj.weight"),
    "attn_output_b.weight": ("attn.wo_b.weight", "attn.o_b_proj.weight"),
    "attn_compressor_kv.weight": (
        "attn.compressor.wkv.weight",
        "attn.compressor.kv_proj.weight",
    ),
    "attn_compressor_gate.weight": (
        "attn.compressor.wgate.weight",
        "attn.compressor.gate_proj.weight",
    ),
    "attn_compressor_ape.weight": (
        "attn.compressor.ape",
        "attn.compressor.position_bias",
    ),
    "attn_compressor_norm.weight": (
        "attn.compressor.norm.weight",
        "attn.compressor.kv_norm.weight",
    ),
    "indexer_compressor_kv.weight": (
        "attn.indexer.compressor.wkv.weight",
        "attn.compressor.indexer.kv_proj.weight",
    ),
    "indexer_compressor_gate.weight": (
        "attn.indexer.compressor.wgate.weight",
        "attn.compressor.indexer.gate_proj.weight",
    ),
    "indexer_compressor_ape.weight": (
        "attn.indexer.compressor.ape",
        "attn.compressor.indexer.position_bias",
    ),
    "indexer_compressor_norm.weight": (
        "attn.indexer.compressor.norm.weight",
        "attn.compressor.indexer.kv_norm.weight",
    ),
    "indexer.attn_q_b.weight": (
        "attn.indexer.wq_b.weight",
        "attn.compressor.indexer.q_b_proj.weight",
    ),
    "indexer.proj.weight": (
        "attn.indexer.weights_proj.weight",
        "attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    "ffn_gate_inp.weight": ("ffn.gate.weight",),
    "exp_probs_b.bias": ("ffn.gate.bias", "ffn.gate.e_score_correction_bias"),
    "ffn_gate_tid2eid.weight": ("ffn.gate.tid2eid",),
    "ffn_gate_exps.weight": ("ffn.experts.*.w1.weight",),
    "ffn_up_exps.weight": ("ffn.experts.*.w3.weight",),
    "ffn_down_exps.weight": ("ffn.experts.*.w2.weight", "ffn.experts.down_proj"),
    "ffn_gate_shexp.weight": (
        "ffn.shared_experts.w1.weight",
        "ffn.shared_experts.gate_proj.weight",
    ),
    "ffn_up_shexp.weight": (
        "ffn.shared_experts.w3.weight",
        "ffn.shared_experts.up_proj.weight",
    ),
    "ffn_down_shexp.weight": (
        "ffn.shared_experts.w2.weight",
        "ffn.shared_experts.down_proj.weight",
    ),
}
_MTP = {
    "e_proj.weight": ("e_proj.weight",),
    "h_proj.weight": ("h_proj.weight",),
    "enorm.weight": ("enorm.weight",),
    "hnorm.weight": ("hnorm.weight",),
    "norm.weight": ("norm.weight",),
    "hc_head_fn.weight": ("hc_head_fn", "hc_head.hc_fn"),
    "hc_head_base.weight": ("hc_head_base", "hc_head.hc_base"),
    "hc_head_scale.weight": ("hc_head_scale", "hc_head.hc_scale"),
    **_LAYER,
}
_FUSED = "ffn.experts.gate_up_proj"


def _by_spelling(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {spelling: gguf for gguf, row in table.items() for spelling in row}


_SPELLINGS = {
    "": _by_spelling(_TOP),
    "blk": _by_spelling(_LAYER),
    "mtp": _by_spelling(_MTP),
}
_SCOPE = re.compile(r"(?:model\.)?(?:(layers)\.(\d+)\.|(mtp)\.(0)\.(?:block\.)?)?(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The GGUF tensor that a checkpoint's tensor is, or is part of.

    Attributes:
      gguf: the tensor's name in GGUF.
      name: the tensor's name in the checkpoint.
      expert: the one expert it holds, None if all (or none).
      half: 0 or 1 if it is that half, along the output axis, of a fused tensor.
    """

    gguf: str
    name: str
    expert: int | None = None
    half: int | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the checkpoint's shape, given that of the GGUF tensor."""
        if self.expert is not None:
            return whole[1:]
        if self.half is not None:
            return whole[0], 2 * whole[1], whole[2]
        return whole


def pieces(name: str) -> list[Piece]:
    """Return what the checkpoint's tensor `name` holds: nothing if it is unknown."""
    match = _SCOPE.fullmatch(name)
    if match is None:
        return []
    layers, number, mtp, zero, leaf = match.groups()
    scope = "blk" if layers else "mtp" if mtp else ""
    prefix = f"{scope}.{int(number or zero)}." if scope else ""
    leaf = re.sub(r"^self_attn\.", "attn.", re.sub(r"^mlp\.", "ffn.", leaf))
    if scope and leaf == _FUSED:
        return [
            Piece(f"{prefix}ffn_{part}_exps.weight", name, half=half)
            for half, part in enumerate(("gate", "up"))
        ]
    expert = _EXPERT.fullmatch(leaf)
    if expert:
        leaf = f"ffn.experts.*.{expert[2]}"
    gguf = _SPELLINGS[scope].get(leaf)
    if gguf is None:
        return []
    return [Piece(prefix + gguf, name, expert=int(expert[1]) if expert else None)]


def official(gguf: str) -> str:
    """Return the official checkpoint's name of a GGUF tensor, for a message."""
    scope, _, rest = gguf.partition(".")
    if scope not in ("blk", "mtp"):
        return _TOP[gguf][0]
    table, prefix = (_LAYER, "layers") if scope == "blk" else (_MTP, "mtp")
    number, _, leaf = rest.partition(".")
    return f"{prefix}.{number}.{table[leaf][0]}"
