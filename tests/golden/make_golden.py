"""Writes `tiny.npz`: what transformers' DeepSeek-V4 computes on a random tiny model.

    python tests/golden/make_golden.py

It needs torch and transformers (`pip install 'ds4jax[golden]'`).  transformers has no
MTP block, so one is assembled here from its layer class.
"""
# pyright: reportMissingImports=false
# make lint has neither torch nor transformers.

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

GOLDEN = Path(__file__).with_name("tiny.npz")

SEQUENCES, TOKENS = 2, 50
SEED = 4

CONFIG: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    head_dim=32,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    num_experts_per_tok=2,
    n_routed_experts=6,
    layer_types=["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"] * 2,
    compress_rates={
        "compressed_sparse_attention": 4,
        "heavily_compressed_attention": 16,
    },
    mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 4,
    sliding_window=8,
    index_n_heads=4,
    index_head_dim=16,
    index_topk=4,
    partial_rotary_factor=0.25,
    swiglu_limit=1.5,  # low enough that the clamp is reached
    rope_parameters={
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
)


class Mtp(nn.Module):
    """The MTP block: one dense layer over a sum of two projections.

    It takes the trunk's streams after the last layer [B, T, M, D] and the embeddings of
    the tokens paired with them [B, T, D].
    """

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        dense = DeepseekV4Config(
            **{
                **config.to_dict(),
                "num_hidden_layers": 1,
                "layer_types": ["sliding_attention"],
                "mlp_layer_types": ["moe"],
            }
        )
        dense._attn_implementation = "eager"
        width, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = nn.Linear(width, width, bias=False)
        self.h_proj = nn.Linear(width, width, bias=False)
        self.enorm = modeling.DeepseekV4RMSNorm(width, eps=eps)
        self.hnorm = modeling.DeepseekV4RMSNorm(width, eps=eps)
        self.norm = modeling.DeepseekV4RMSNorm(width, eps=eps)
        self.block = modeling.DeepseekV4DecoderLayer(dense, 0)
        self.hc_head = modeling.DeepseekV4HyperHead(dense)
        self.rotary = modeling.DeepseekV4RotaryEmbedding(dense)
        self.window = config.sliding_window

    def forward(self, streams: torch.Tensor, embedded: torch.Tensor):
        """Return the block's streams [B, T, M, D] and its normed hidden [B, T, D]."""
        positions = torch.arange(embedded.shape[1])[None]
        behind = positions[0, :, None] - positions[0, None, :]
        visible = (behind >= 0) & (behind < self.window)
        mask = torch.where(visible, 0.0, float("-inf"))[None, None]
        x = self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(
            self.hnorm(streams)
        )
        x = self.block(
            x,
            position_embeddings={"main": self.rotary(embedded, positions, "main")},
            position_ids=positions,
            attention_mask=mask,
        )
        return x, self.norm(self.hc_head(x))


def lowest_index_topk(x: torch.Tensor, k: int, dim: int = -1, **_):
    """Stand in for `torch.topk`, which leaves open which of two equals it takes."""
    values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values[..., :k], indices[..., :k]))


def build(
    config: DeepseekV4Config, weights: dict[str, np.ndarray]
) -> tuple[DeepseekV4ForCausalLM, Mtp]:
    """Return transformers' model and the MTP block, with these weights in float32."""
    model = DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager")
    mtp = Mtp(config)
    state = {
        name: torch.tensor(
            values.astype(np.int64 if name.endswith("tid2eid") else np.float32)
        )
        for name, values in weights.items()
    }
    head = {name: state.pop(name) for name in list(state) if name.startswith("mtp.0.")}
    model.load_state_dict(state)
    mtp.load_state_dict({k.removeprefix("mtp.0."): v for k, v in head.items()})
    return model.float().eval(), mtp.float().eval()


@torch.no_grad()
def run(
    model: DeepseekV4ForCausalLM, mtp: Mtp, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the outputs on `tokens` [B, T]; `golden.load` says what they are."""
    seen: dict[str, list[torch.Tensor]] = {
        name: []
        for name in ("streams", "router", "router_logits", "indexer", "indexer_scores")
    }
    trunk: Any = model.model
    ids = torch.tensor(tokens, dtype=torch.int64)

    def streams(module, args, output):
        seen["streams"] += [args[0], output] if not seen["streams"] else [output]

    def router(module, args, output):
        seen["router_logits"].append(output[0].reshape(*tokens.shape, -1))
        seen["router"].append(output[2].reshape(*tokens.shape, -1))

    def indexer(module, args, output):
        seen["indexer"].append(output)

    def scorer(module, args, output):
        seen["indexer_scores"].append(output)

    with (
        mock.patch.object(torch, "topk", lowest_index_topk),
        mock.patch.object(torch.Tensor, "topk", lowest_index_topk),
    ):
        hooks = []
        for layer in trunk.layers:
            hooks.append(layer.register_forward_hook(streams))
            hooks.append(layer.mlp.gate.register_forward_hook(router))
            if isinstance(layer.self_attn.compressor, modeling.DeepseekV4CSACompressor):
                part = layer.self_attn.compressor.indexer
                hooks.append(part.register_forward_hook(indexer))
                hooks.append(part.scorer.register_forward_hook(scorer))
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()

        cache = DynamicCache(config=model.config)
        steps = [
            model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            for t in range(ids.shape[1])
        ]
        embedded, last = trunk.embed_tokens(ids), seen["streams"][-1]
        mtp_streams, mtp_hidden = mtp(last[:, :-1], embedded[:, 1:])
        ds4_streams, ds4_hidden = mtp(last, embedded)

    outputs = {
        **{name: torch.stack(values) for name, values in seen.items()},
        "hidden": hidden,
        "logits": model.lm_head(hidden),
        "decode_logits": torch.cat(steps, 1),
        "mtp_streams": mtp_streams,
        "mtp_logits": model.lm_head(mtp_hidden),
        "mtp_ds4_streams": ds4_streams,
        "mtp_ds4_logits": model.lm_head(ds4_hidden),
    }
    arrays = {name: values.numpy() for name, values in outputs.items()}
    for name in ("router", "indexer"):
        arrays[name] = arrays[name].astype(np.int32)
    return arrays


def random_weights(config: DeepseekV4Config, seed: int) -> dict[str, np.ndarray]:
    """Return float16 weights (and int32 tables) under transformers' names.

    They are of the size that keeps every part of the model busy: logits of standard
    deviation 1, streams of a few, clamps that are reached, sharp and blunt softmaxes.
    """
    model = DeepseekV4ForCausalLM(config)
    state = model.state_dict()
    state |= {f"mtp.0.{k}": v for k, v in Mtp(config).state_dict().items()}
    draw = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        leaf = name.split(".")[-1]
        if leaf == "tid2eid":
            experts = draw.random((shape[0], config.n_routed_experts)).argsort(1)
            return experts[:, : shape[1]].astype(np.int32)
        noise = draw.standard_normal(shape)
        if "norm" in name or leaf in ("scale", "hc_scale"):
            values = 1 + 0.2 * noise
        elif len(shape) == 1:  # sinks, routing biases, bases of the hyper-connections
            values = 0.3 * noise
        elif leaf == "position_bias" or "embed_tokens" in name:
            values = noise
        else:
            values = noise / np.sqrt(shape[-1])
        return values.astype(np.float16)

    return {name: one(name, tuple(state[name].shape)) for name in sorted(state)}


def closest_call(outputs: dict[str, np.ndarray], weights: dict, top: int) -> float:
    """Return by how little the nearest selection of a router or indexer was made.

    Exact ties are left out: they are rows that score 0, and the rule decides them.
    """
    gaps = []
    for layer, logits in enumerate(outputs["router_logits"]):
        bias = weights.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        if bias is not None:
            scores = np.sqrt(np.logaddexp(0, logits)) + bias
            ranked = -np.sort(-scores, -1)
            gaps.append(ranked[..., 1] - ranked[..., 2])
    ready = (np.arange(TOKENS) + 1) // 4
    scores = outputs["indexer_scores"]
    future = np.arange(scores.shape[-1]) >= ready[:, None]
    ranked = -np.sort(-np.where(future, -np.inf, scores), -1)[..., ready > top, :]
    gaps.append(ranked[..., top - 1] - ranked[..., top])
    flat = np.concatenate([gap.ravel() for gap in gaps])
    return float(flat[flat > 0].min())


def make() -> dict[str, np.ndarray]:
    """Return the content of `tiny.npz`."""
    config = DeepseekV4Config(**CONFIG)
    weights = random_weights(config, SEED)
    draw = np.random.default_rng(SEED)
    tokens = draw.integers(config.vocab_size, size=(SEQUENCES, TOKENS), dtype=np.int32)
    outputs = run(*build(config, weights), tokens)
    apart = np.abs(outputs["logits"] - outputs["decode_logits"]).max()
    margin = closest_call(outputs, weights, config.index_topk)
    print(f"closest selection {margin:.1e}, prefill and decode {apart:.1e} apart")
    if margin < 1e-4 or apart > 3e-5:
        sys.exit("another SEED is needed: float32 would not reproduce the selections")
    return {
        "config": np.array(json.dumps(config.to_dict())),
        "tokens": tokens,
        **{f"weights/{name}": values for name, values in weights.items()},
        **outputs,
    }


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, allow_pickle=False, **make())
