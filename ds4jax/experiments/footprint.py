"""Where a model's bytes are, and how many of them one decoding pass reads.

Weights bound decoding: a pass reads every dense weight once whatever its rows, but only
the experts that its rows chose.  This is arithmetic on tensor sizes; nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ds4jax.config import ModelConfig
from ds4jax.model.deepseek import Model

_NAMES = {
    "attention": r"attn_(q_a|q_b|kv|output_a|output_b)\.weight",
    "shared experts": r"ffn_(gate|up|down)_shexp\.weight",
    "routed experts": r"ffn_(gate|up|down)_exps\.weight",
    "router": r"ffn_gate_inp\.weight|exp_probs_b\.bias",
    "hyper connections": r"(output_)?hc_(attn_|ffn_|head_)?(fn|scale|base)\.weight",
    "compressors": r"attn_compressor_(kv|gate|ape|norm)\.weight",
    "indexer": r"indexer(\.attn_q_b|\.proj|_compressor_(kv|gate|ape|norm))\.weight",
    "head": r"output\.weight",
    "norms and sinks": r"([eh]|\w+_)?norm\.weight|attn_sinks\.weight",
    "hash table": r"ffn_gate_tid2eid\.weight",
    "embedding": r"token_embd\.weight",
    "MTP projections": r"[eh]_proj\.weight",
}
_PREFIX = r"(blk\.\d+\.|mtp\.0\.)?"

OTHER = "other"
"""The group of what is no tensor of a trunk or of an MTP block."""


def group_of(name: str) -> str:
    """Return the group of the tensor `name`."""
    for group, leaf in _NAMES.items():
        if re.fullmatch(f"{_PREFIX}({leaf})", name):
            return group
    return OTHER


def by_group(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of each group that occurs, given the bytes of each tensor."""
    totals = dict.fromkeys([*_NAMES, OTHER], 0)
    for name, size in sizes.items():
        totals[group_of(name)] += size
    return {group: total for group, total in totals.items() if total}


def distinct_experts(config: ModelConfig, rows: int) -> float:
    """Return how many experts of a layer `rows` rows choose together, expected.

    Rows are taken to choose independently and uniformly: E (1 - (1 - U/E)^rows).  Real
    rows agree more often, and a hash layer sends equal tokens to equal experts.
    """
    missed = (1 - config.experts_used / config.experts) ** rows
    return config.experts * (1 - missed)


def bytes_read(sizes: Mapping[str, int], config: ModelConfig, rows: int) -> float:
    """Return the weight bytes that one pass of `rows` rows reads, expected.

    Args:
      sizes: bytes of each tensor, by name.
      config: the model; its E, U and V tell how much of a table a row touches.
      rows: tokens in the pass.  Embedding and hash tables give one row a token; the
        cache is not counted, and neither is a tensor of the group `other`.
    """
    share = {
        "routed experts": distinct_experts(config, rows) / config.experts,
        "hash table": rows / config.vocab,
        "embedding": rows / config.vocab,
        OTHER: 0.0,
    }
    return sum(
        total * share.get(group, 1.0) for group, total in by_group(sizes).items()
    )


def pass_bytes(model: Model, rows: int) -> float:
    """Return the weight bytes that a target pass reads, see `bytes_read`."""
    sizes = {name: weight.nbytes for name, weight in model.trunk.items()}
    return bytes_read(sizes, model.config, rows)


def draft_bytes(model: Model) -> float:
    """Return the weight bytes that a draft reads: an MTP pass of one row's experts,
    and the LM head, which is the trunk's."""
    sizes = {name: weight.nbytes for name, weight in model.mtp.items()}
    head = model.trunk["output.weight"].nbytes
    return bytes_read(sizes, model.config, 1) + head
