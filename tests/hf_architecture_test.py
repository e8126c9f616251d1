"""`config.json` in the official layout and in transformers'."""

import copy
import re

import pytest
from checkpoints import CONFIG, TRANSFORMERS_JSON

from ds4jax import hf
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, FileError

# What DeepSeek publishes for V4-Flash, and for a model of the golden vectors' shape.
FLASH_JSON = dict(
    model_type="deepseek_v4", attention_bias=False, hc_eps=1e-6, hc_mult=4,
    hc_sinkhorn_iters=20, head_dim=512, hidden_act="silu", hidden_size=4096,
    index_head_dim=128, index_n_heads=64, index_topk=512, moe_intermediate_size=2048,
    n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=64, num_experts_per_tok=6, num_hidden_layers=43,
    num_hash_layers=3, num_key_value_heads=1, num_nextn_predict_layers=1, o_groups=8,
    o_lora_rank=1024, q_lora_rank=1024, qk_rope_head_dim=64, rms_norm_eps=1e-6,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=16, type="yarn",
                      original_max_position_embeddings=65536),
    rope_theta=10000, compress_rope_theta=160000, routed_scaling_factor=1.5,
    scoring_func="sqrtsoftplus", sliding_window=128, swiglu_limit=10.0,
    tie_word_embeddings=False, topk_method="noaux_tc", vocab_size=129280,
    compress_ratios=[0, 0, *[4, 128] * 20, 4, 0],
)  # fmt: skip
TINY_JSON = FLASH_JSON | dict(
    vocab_size=96, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=6,
    num_attention_heads=4, head_dim=32, q_lora_rank=32, o_groups=2, o_lora_rank=16,
    num_experts_per_tok=2, n_routed_experts=6, compress_ratios=[0, 0, 4, 16, 4, 16, 0],
    num_hash_layers=2, sliding_window=8, index_n_heads=4, index_head_dim=16,
    index_topk=4, qk_rope_head_dim=8, swiglu_limit=1.5,
)  # fmt: skip


def test_flash_and_both_layouts():
    assert hf.config(FLASH_JSON) == ModelConfig.flash()
    assert hf.config(TINY_JSON) == hf.config(TRANSFORMERS_JSON) == CONFIG


@pytest.mark.parametrize("json_", [TINY_JSON, TRANSFORMERS_JSON], ids=["ours", "hf"])
def test_a_key_that_is_gone_is_named(json_):
    needed = 0
    for key in json_:
        try:
            hf.config({k: v for k, v in json_.items() if k != key})
        except ConfigError as error:
            needed += 1
            assert "\n" not in str(error)
            assert "no such key" in str(error) and "config.json" in str(error)
    assert needed >= 27


@pytest.mark.parametrize(
    "layout, change, message",
    [
        (TINY_JSON, {"model_type": "llama"}, "model_type: expected 'deepseek_v4'"),
        (TINY_JSON, {"hidden_size": "64"}, "hidden_size: expected an integer"),
        (TINY_JSON, {"hidden_size": True}, "hidden_size: expected an integer"),
        (TINY_JSON, {"hc_eps": False}, "hc_eps: expected a number"),
        (TINY_JSON, {"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
        (TINY_JSON, {"scoring_func": "sigmoid"}, "scoring_func: expected 'sqrts"),
        (TINY_JSON, {"tie_word_embeddings": True}, "tie_word_embeddings: expected F"),
        (TINY_JSON, {"compress_ratios": [0, 0, 4, 16, 4, 16, 4]}, "from entry 6 on"),
        (TINY_JSON, {"compress_ratios": [0, 0, 4, 16]}, "compress_ratios: expected 6"),
        (TINY_JSON, {"compress_ratios": None}, "compress_ratios: expected a list"),
        (TINY_JSON, {"rope_scaling": None}, "rope_scaling: expected an object"),
        (TINY_JSON, {"rope_scaling": {"type": "linear"}}, "type: expected 'yarn'"),
        (TINY_JSON, {"partial_rotary_factor": 0.5}, "qk_rope_head_dim: expected 16"),
        (TINY_JSON, {"num_attention_heads": 3}, "o_groups: expected a divisor of 3"),
        (TINY_JSON, {"layer_types": ["sliding_attention"] * 6}, "as in layer_types"),
        (TINY_JSON, {"mlp_layer_types": ["moe"] * 6}, "num_hash_layers: expected 0"),
        (TRANSFORMERS_JSON, {"layer_types": ["full"] * 6}, "layer_types: expected"),
        (TRANSFORMERS_JSON, {"compress_rates": {}}, "heavily_compressed_attention"),
        (TRANSFORMERS_JSON, {"rope_theta": 5.0}, "rope_theta: expected 10000.0"),
        (TRANSFORMERS_JSON, {"rope_scaling": {}}, "rope_scaling: expected no such"),
        (
            TRANSFORMERS_JSON,
            {"mlp_layer_types": ["moe", "hash_moe"] * 3},
            "mlp_layer_types: expected hash_moe, then moe",
        ),
        (
            TRANSFORMERS_JSON,
            {"compress_rates": {"compressed_sparse_attention": 8}},
            "compressed_sparse_attention: expected 4",
        ),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(layout, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        hf.config(layout | change)
    assert str(error.value).startswith("config.json: ")
    assert "\n" not in str(error.value)


def test_yarns_magnitude_must_be_off():
    changed = copy.deepcopy(TRANSFORMERS_JSON)
    changed["rope_parameters"]["compress"]["attention_factor"] = 1.277
    with pytest.raises(ConfigError, match="attention_factor: expected 1.0"):
        hf.config(changed)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_config_file_must_be_there_and_json(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileError, match=r"config\.json: expected a JSON") as error:
        hf.load(tmp_path)
    assert "\n" not in str(error.value)
