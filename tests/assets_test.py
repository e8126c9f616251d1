"""The small trained model that ships is whole, small, and what its card says it is.

These fail in a checkout without it.
"""

import functools
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax import assets, gguf, schema
from ds4jax.config import ModelConfig
from ds4jax.quant import QuantTensor
from ds4jax.tokenizer import Tokenizer

MOST_BYTES = 24_000_000
"""Of both files together: what a wheel may weigh."""

FILES = pytest.mark.parametrize("path", [assets.trunk, assets.mtp])


@functools.cache
def trunk():
    return gguf.load_trunk(assets.trunk())


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)


def test_the_trunk_is_of_the_architecture_that_config_calls_tiny():
    config, weights = trunk()
    assert config == ModelConfig.tiny()
    assert weights.keys() == schema.trunk(config).keys()


def test_the_mtp_block_is_of_the_same_model():
    config, _ = trunk()
    assert gguf.load_mtp(assets.mtp(), config).keys() == schema.mtp(config).keys()


def test_it_has_every_kind_of_layer_and_router():
    config, weights = trunk()
    kinds = {"dense" if r == 0 else "CSA" if r == 4 else "HCA": i
             for i, r in enumerate(config.compress_ratios)}  # fmt: skip
    assert kinds.keys() == {"dense", "CSA", "HCA"}
    for name in ("attn_compressor_kv", "indexer.attn_q_b"):
        assert f"blk.{kinds['CSA']}.{name}.weight" in weights
        assert f"blk.{kinds['dense']}.{name}.weight" not in weights
    assert f"blk.{kinds['HCA']}.attn_compressor_kv.weight" in weights
    assert f"blk.{kinds['HCA']}.indexer.attn_q_b.weight" not in weights
    routers = {name.split(".", 2)[2] for name in weights if name.startswith("blk.")}
    assert {"ffn_gate_tid2eid.weight", "exp_probs_b.bias"} <= routers


def test_it_is_trained():
    """A file of fresh weights, whose norms are all ones, would load as well."""
    _, weights = trunk()
    norms = [name for name in weights if name.endswith(("attn_norm.weight",
             "ffn_norm.weight", "output_norm.weight"))]  # fmt: skip
    for name in norms:
        values = weights[name]
        assert isinstance(values, np.ndarray)
        assert np.unique(values).size > values.size // 2, name


def test_it_is_quantised():
    config, weights = trunk()
    for name, spec in schema.trunk(config).items():
        if spec.group in ("dense", "experts", "down"):
            assert isinstance(weights[name], QuantTensor), name


@pytest.mark.parametrize("kind", assets.PROMPTS)
def test_a_prompt_is_long_enough_to_study(kind):
    """At least 256 tokens, and one of them says again what it says first."""
    tokens = tokenizer().encode(assets.prompt(kind).read_text())
    assert 256 <= len(tokens) <= 1024
    tail = tokens[-8:]
    repeats = any(tokens[i : i + 8] == tail for i in range(len(tokens) - 8))
    assert repeats == (kind == "copy")


def test_both_files_are_small():
    sizes = [path().stat().st_size for path in (assets.trunk, assets.mtp)]
    assert sum(sizes) <= MOST_BYTES, sizes


@pytest.mark.parametrize(
    "text",
    ["", "The sea was calm;\n\n\tthe old man rowed home.", "def f(x):\n    return x",
     "café 漢字 😀 \x00\r\n", "<｜User｜>", "1234567 <think>"],
)  # fmt: skip
def test_text_survives_the_tokenizer(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_survives_the_tokenizer(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_the_vocabulary_is_the_models_and_shortens_english():
    assert tokenizer().vocab_size == trunk()[0].vocab
    text = "The old man went back to the house by the sea, and his wife was there."
    assert len(tokenizer().encode(text)) < len(text) / 2


def card() -> str:
    return Path(assets.__file__).with_name("MODEL_CARD.md").read_text("utf-8")


@FILES
def test_the_card_names_the_file_its_size_and_its_sha256(path):
    content = path().read_bytes()
    numbers = re.findall(r"\d+", re.sub(r"(?<=\d)[,_ ](?=\d{3})", "", card()))
    assert path().name in card()
    assert str(len(content)) in numbers
    assert hashlib.sha256(content).hexdigest() in card()
