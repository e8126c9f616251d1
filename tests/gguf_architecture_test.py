"""`deepseek4.*` metadata to a configuration and back."""

import pathlib

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Value

from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, FileError
from ds4jax.gguf import GGUF, config, metadata, read, write

ROUND_TRIPS = {
    "flash": ModelConfig.flash(),
    "tiny": ModelConfig.tiny(),
    "odd": ModelConfig.tiny(
        rms_eps=3e-7,
        routed_scale=2.25,
        swiglu_limit=7.1,
        rope_theta=12345.5,
        yarn_beta_fast=31.7,
        yarn_original_context=2**33,
    ),
}


def of(**changes) -> GGUF:
    """Return Flash's metadata with `key=value` set, or dropped if the value is None."""
    keys = metadata(ModelConfig.flash())
    for name, value in changes.items():
        keys[name] = value
    return GGUF(
        pathlib.Path("m.gguf"), {k: v for k, v in keys.items() if v is not None}, {}
    )


def with_key(key: str, value) -> GGUF:
    return of(**{f"deepseek4.{key}": value})


@pytest.mark.parametrize("model", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_configuration_survives_a_file(tmp_path, model):
    path = tmp_path / "m.gguf"
    write(path, metadata(model), {"t": (np.zeros(4, np.float32), "F32")})
    assert config(read(path)) == model


def test_flash_is_written_with_the_keys_types_and_values_that_ds4_checks(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, metadata(ModelConfig.flash()), {"t": (np.zeros(4, "f4"), "F32")})
    fields = gguf.GGUFReader(path).fields
    integers = {
        "block_count": 43, "embedding_length": 4096, "vocab_size": 129280,
        "attention.head_count": 64, "attention.head_count_kv": 1,
        "attention.key_length": 512, "attention.value_length": 512,
        "rope.dimension_count": 64, "attention.q_lora_rank": 1024,
        "attention.output_lora_rank": 1024, "attention.output_group_count": 8,
        "attention.sliding_window": 128, "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128, "attention.indexer.top_k": 512,
        "expert_count": 256, "expert_used_count": 6,
        "expert_feed_forward_length": 2048, "expert_shared_count": 1,
        "hash_layer_count": 3, "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20,
        "rope.scaling.original_context_length": 65536,
    }  # fmt: skip
    floats = {
        "rope.freq_base": 10000, "rope.scaling.factor": 16,
        "rope.scaling.yarn_beta_fast": 32, "rope.scaling.yarn_beta_slow": 1,
        "attention.compress_rope_freq_base": 160000, "expert_weights_scale": 1.5,
        "attention.layer_norm_rms_epsilon": 1e-6, "hyper_connection.epsilon": 1e-6,
    }  # fmt: skip
    ratios = [0, 0] + [4, 128] * 20 + [4]
    expected = {k: ([Value.UINT32], v) for k, v in integers.items()}
    expected |= {k: ([Value.FLOAT32], float(np.float32(v))) for k, v in floats.items()}
    expected |= {
        "expert_weights_norm": ([Value.BOOL], True),
        "context_length": ([Value.UINT64], 2**20),
        "attention.compress_ratios": ([Value.ARRAY, Value.INT32], ratios),
        "swiglu_clamp_exp": ([Value.ARRAY, Value.FLOAT32], [10.0] * 43),
    }
    found = {
        key.removeprefix("deepseek4."): (field.types, field.contents())
        for key, field in fields.items()
        if key.startswith("deepseek4.")
    }
    assert found == expected
    assert fields["general.architecture"].contents() == "deepseek4"


REQUIRED = [
    key
    for key in metadata(ModelConfig.flash())
    if key not in ("general.architecture", "deepseek4.context_length")
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_or_mistyped_key_is_named(key):
    with pytest.raises(ConfigError, match=f"^m.gguf: .*{key} is missing: expected "):
        config(of(**{key: None}))
    for wrong in ("text", ["a", "b"], -1, np.ones(2, np.uint8)):
        with pytest.raises(ConfigError, match=f"m.gguf: .*{key}: expected .*, found "):
            config(of(**{key: wrong}))


WRONG = {
    "two kv heads": ("attention.head_count_kv", 2, "expected 1, found 2"),
    "values unlike keys": ("attention.value_length", 64, "expected 512, found 64"),
    "weights not normed": ("expert_weights_norm", False, "expected true, found False"),
    "norm as number": ("expert_weights_norm", 1, "expected true, found 1"),
    "expert groups": ("expert_group_count", 8, "expected 0, found 8"),
    "groups used": ("expert_group_used_count", 4, "expected 0, found 4"),
    "true for a count": ("block_count", True, "non-negative integer, found True"),
    "float for a count": ("block_count", 43.0, "non-negative integer, found 43.0"),
    "true for a number": ("rope.freq_base", True, "positive number, found True"),
    "NaN": ("rope.freq_base", float("nan"), "positive number, found nan"),
    "short ratios": (
        "attention.compress_ratios",
        np.zeros(42, np.int32),
        "list of at least 43 integers, found a list of 42 x int32",
    ),
    "float ratios": (
        "attention.compress_ratios",
        np.zeros(43, np.float32),
        "list of at least 43 integers, found a list of 43 x float32",
    ),
    "negative ratio": (
        "attention.compress_ratios",
        np.full(43, -4, np.int32),
        "m.gguf: compress_ratios: expected 43 non-negative integers",
    ),
    "short clamps": (
        "swiglu_clamp_exp",
        np.full(42, 10, np.float32),
        "list of at least 43 numbers, found a list of 42 x float32",
    ),
    "unequal clamps": (
        "swiglu_clamp_exp",
        np.arange(1, 44, dtype=np.float32),
        "the same number for every layer",
    ),
    "inconsistent": ("rope.dimension_count", 63, "m.gguf: rope_dim: expected an even"),
    "no layers": ("block_count", 0, "m.gguf: .*found"),
}


@pytest.mark.parametrize("key, value, message", WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_in_one_line(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config(with_key(key, value))
    assert "\n" not in str(caught.value)


def test_numbers_may_have_other_widths():
    flash = ModelConfig.flash()
    assert config(with_key("rope.freq_base", 10000)) == flash
    assert config(with_key("hyper_connection.epsilon", 1e-6)) == flash
    assert config(with_key("expert_group_count", 0)) == flash
    ratios = np.asarray(flash.compress_ratios, np.uint32)
    assert config(with_key("attention.compress_ratios", ratios)) == flash
    assert config(with_key("swiglu_clamp_exp", np.full(43, 10.0))) == flash


def test_an_f64_keeps_its_precision():
    found = config(with_key("hyper_connection.epsilon", 1.2345678901e-6))
    assert found.hc_eps == 1.2345678901e-6


def test_lists_may_go_on_after_the_last_layer():
    """llama.cpp's converter counts the MTP block among them."""
    flash = ModelConfig.flash()
    ratios = np.asarray([*flash.compress_ratios, 0], np.int32)
    clamps = np.asarray([10.0] * 43 + [3.0], np.float32)
    found = with_key("attention.compress_ratios", ratios)
    found.metadata["deepseek4.swiglu_clamp_exp"] = clamps
    assert config(found) == flash


def test_another_architecture_is_refused():
    with pytest.raises(FileError, match="expected 'deepseek4', found 'llama'"):
        config(of(**{"general.architecture": "llama"}))
    with pytest.raises(FileError, match="expected 'deepseek4', found None"):
        config(of(**{"general.architecture": None}))
