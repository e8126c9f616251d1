"""Checkpoints: every spelling of a tensor, files that are not whole, FP8 and FP4."""

import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    MTP,
    OFFICIAL,
    OFFICIAL_TOP,
    OFFICIAL_WEIGHTS,
    TRANSFORMERS,
    TRANSFORMERS_JSON,
    TRUNK,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax import hf, schema
from ds4jax.errors import FileError


@pytest.fixture
def checkpoint(tmp_path):
    """Return a function that writes a checkpoint's directory."""

    def make(tensors=OFFICIAL_WEIGHTS, config=TRANSFORMERS_JSON) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        write(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return make


def assert_golden(trunk, mtp, with_mtp=True):
    for found, expected in ((trunk, TRUNK), (mtp, MTP if with_mtp else {})):
        assert set(found) == set(expected)
        for name, values in expected.items():
            assert found[name].dtype == values.dtype, name
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Spellings


def test_official_names(checkpoint):
    config, trunk, mtp = hf.load(checkpoint())
    assert config == CONFIG
    assert_golden(trunk, mtp)


def test_transformers_halves_are_gate_then_up():
    fused = TRANSFORMERS["model.layers.2.mlp.experts.gate_up_proj"]
    width = CONFIG.expert_ffn
    np.testing.assert_array_equal(TRUNK["blk.2.ffn_gate_exps.weight"], fused[:, :width])
    np.testing.assert_array_equal(TRUNK["blk.2.ffn_up_exps.weight"], fused[:, width:])


def test_transformers_names_mean_the_official_ones():
    """One tensor of each kind, by hand: the golden weights came in these names."""
    sparse, mtp = "model.layers.2.self_attn.compressor.", "mtp.0.block."
    rows = "layers.2.attn.indexer."
    pairs = {
        "model.embed_tokens.weight": "embed.weight",
        "lm_head.weight": "head.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.layers.0.self_attn.sinks": "layers.0.attn.attn_sink",
        "model.layers.0.self_attn.q_a_norm.weight": "layers.0.attn.q_norm.weight",
        "model.layers.0.self_attn.o_b_proj.weight": "layers.0.attn.wo_b.weight",
        "model.layers.0.attn_hc.scale": "layers.0.hc_attn_scale",
        "model.layers.0.ffn_hc.base": "layers.0.hc_ffn_base",
        "model.layers.0.post_attention_layernorm.weight": "layers.0.ffn_norm.weight",
        f"{sparse}gate_proj.weight": "layers.2.attn.compressor.wgate.weight",
        f"{sparse}indexer.kv_proj.weight": f"{rows}compressor.wkv.weight",
        f"{sparse}indexer.position_bias": f"{rows}compressor.ape",
        f"{sparse}indexer.q_b_proj.weight": f"{rows}wq_b.weight",
        f"{sparse}indexer.scorer.weights_proj.weight": f"{rows}weights_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias": "layers.2.ffn.gate.bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight": (
            "layers.2.ffn.shared_experts.w3.weight"
        ),
        "mtp.0.hc_head.hc_base": "mtp.0.hc_head_base",
        f"{mtp}self_attn.kv_norm.weight": "mtp.0.attn.kv_norm.weight",
        f"{mtp}input_layernorm.weight": "mtp.0.attn_norm.weight",
    }
    for transformers, ours in pairs.items():
        np.testing.assert_array_equal(
            TRANSFORMERS[transformers], OFFICIAL_WEIGHTS[ours], err_msg=transformers
        )


def test_names_that_transformers_saves(checkpoint):
    """`save_pretrained` undoes its renaming by half, and drops the MTP block."""
    saved = {}
    for name, values in OFFICIAL_WEIGHTS.items():
        if name.startswith("mtp."):
            continue
        name = name.replace("attn.kv_norm", "attn.norm")
        name = re.sub("^hc_head_", "model.hc_head.hc_", name)
        name = {"embed.weight": "model.embed_tokens.weight"}.get(name, name)
        saved[re.sub("^(layers|norm)", r"model.\1", name)] = values
    assert len(set(saved) - set(OFFICIAL_WEIGHTS)) == len(saved) - 1  # head.weight
    _, trunk, mtp = hf.load(checkpoint(saved, TRANSFORMERS_JSON))
    assert_golden(trunk, mtp, with_mtp=False)


# Files


def shard(root: Path, tensors=OFFICIAL_WEIGHTS) -> dict[str, str]:
    """Cut a checkpoint in three files with an index, and return what the index maps."""
    (root / "config.json").write_text(json.dumps(TRANSFORMERS_JSON))
    placed = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        file = f"model-0000{number + 1}-of-00003.safetensors"
        write(root / file, part)
        placed |= dict.fromkeys(part, file)
    index(root, {"metadata": {}, "weight_map": placed})
    return placed


def index(root: Path, content):
    path = root / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_shards(tmp_path):
    shard(tmp_path)
    write(tmp_path / "model.safetensors", {})  # not in the index: not read
    _, trunk, mtp = hf.load(tmp_path)
    assert_golden(trunk, mtp)


def test_values_are_read_when_asked_for(checkpoint):
    root = checkpoint()
    _, _, mtp = hf.load(root)
    with open(root / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)  # the last tensor: mtp.0.hc_head_scale
        file.write(np.float32(7.5).tobytes())
    assert mtp["mtp.0.hc_head_scale.weight"] == 7.5


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root, placed: index(root, "{"), "index.json: not a safetensors index"),
        (lambda root, placed: index(root, {}), "index.json: not a safetensors index"),
        (
            lambda root, placed: index(root, {"weight_map": {}}),
            "weight_map: expected names of files",
        ),
        (
            lambda root, placed: index(root, {"weight_map": {"x": "../x.safetensors"}}),
            "found ['../x.safetensors']",
        ),
        (
            lambda root, placed: index(root, {"weight_map": placed | {"x": "none"}}),
            "none: expected a whole safetensors file",
        ),
        (
            lambda root, placed: index(
                root, {"weight_map": placed | {"extra": placed["embed.weight"]}}
            ),
            "extra is missing; model.safetensors.index.json lists it",
        ),
        (
            lambda root, placed: index(
                root, {"weight_map": placed | {"embed.weight": placed["head.weight"]}}
            ),
            "holds embed.weight, but model.safetensors.index.json places it in",
        ),
        (
            lambda root, placed: (root / placed["embed.weight"]).unlink(),
            "00001-of-00003.safetensors: expected a whole safetensors file",
        ),
        (
            lambda root, placed: os.truncate(root / placed["embed.weight"], 100_000),
            "00001-of-00003.safetensors: expected a whole safetensors file",
        ),
        (
            lambda root, placed: os.truncate(root / placed["embed.weight"], 0),
            "00001-of-00003.safetensors: expected a whole safetensors file",
        ),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, spoil, message):
    spoil(tmp_path, shard(tmp_path))
    with pytest.raises(FileError, match=re.escape(message)) as error:
        hf.load(tmp_path)
    assert one_line(error).startswith(str(tmp_path))


def without(name):
    return {k: v for k, v in OFFICIAL_WEIGHTS.items() if k != name}


WQ_A = "layers.0.attn.wq_a"


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without("head.weight"), "head.weight is missing"),
        (without("layers.3.ffn.gate.bias"), "layers.3.ffn.gate.bias is missing"),
        (
            without("layers.3.ffn.experts.5.w2.weight"),
            "layers.3.ffn.experts.*.w2.weight (expert 5) is missing",
        ),
        (without("mtp.0.enorm.weight"), "mtp.0.enorm.weight is missing"),
        (
            OFFICIAL_WEIGHTS | {"layers.0.attn.wq_c.weight": np.zeros(1, np.float32)},
            "layers.0.attn.wq_c.weight: unknown tensor",
        ),
        (
            OFFICIAL_WEIGHTS | {"mtp.1.norm.weight": np.zeros(64, np.float32)},
            "mtp.1.norm.weight: unknown tensor",
        ),
        (
            OFFICIAL_WEIGHTS | {"layers.6.attn.attn_sink": np.zeros(4, np.float32)},
            "layers.6.attn.attn_sink: config.json has no such tensor",
        ),
        (
            OFFICIAL_WEIGHTS | {"layers.0.ffn.gate.bias": np.zeros(6, np.float32)},
            "layers.0.ffn.gate.bias: config.json has no such tensor",
        ),
        (
            OFFICIAL_WEIGHTS
            | {"layers.1.ffn.experts.6.w1.weight": np.zeros((32, 64), np.float32)},
            "layers.1.ffn.experts.6.w1.weight: one tensor too many",
        ),
        (
            OFFICIAL_WEIGHTS | {"lm_head.weight": OFFICIAL_WEIGHTS["head.weight"]},
            "head.weight and lm_head.weight are the same tensor",
        ),
        (
            OFFICIAL_WEIGHTS | {f"{WQ_A}.weight": np.zeros((32, 65), np.float32)},
            f"{WQ_A}.weight: expected shape [32, 64], found [32, 65]",
        ),
        (
            OFFICIAL_WEIGHTS | {f"{WQ_A}.weight": np.zeros((32, 64), np.int32)},
            "found int32 with no scales",
        ),
        (
            OFFICIAL_WEIGHTS | {f"{WQ_A}.weight": np.zeros((32, 32), np.int8)},
            "found int8 with no scales",
        ),
        (
            OFFICIAL_WEIGHTS | {f"{WQ_A}.scale": np.ones((1, 1), np.float32)},
            "found float32 with scales",
        ),
        (
            OFFICIAL_WEIGHTS
            | {
                f"{WQ_A}.weight": np.zeros((32, 64), ml_dtypes.float8_e4m3fn),
                f"{WQ_A}.scale": np.ones((1, 2), ml_dtypes.float8_e8m0fnu),
            },
            f"scale of {WQ_A}.weight: expected shape [1, 1], found [1, 2]",
        ),
        (
            OFFICIAL_WEIGHTS | {f"{WQ_A}.weight": np.zeros((32, 64), np.uint8)},
            f"{WQ_A}.weight: expected one of F32, F16",
        ),
        (
            OFFICIAL_WEIGHTS
            | {"layers.0.ffn.gate.tid2eid": np.zeros((96, 2), np.float32)},
            "tid2eid: expected int32 or int64, found float32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint, tensors, message):
    root = checkpoint(tensors)
    with pytest.raises(FileError, match=re.escape(message)) as error:
        hf.load(root)
    assert one_line(error).startswith(str(root))


@pytest.mark.parametrize("expert", [-1, CONFIG.experts])
def test_a_table_must_name_experts_that_exist(checkpoint, expert):
    table = OFFICIAL_WEIGHTS["layers.1.ffn.gate.tid2eid"].copy()
    table[95, 1] = expert
    _, trunk, _ = hf.load(
        checkpoint(OFFICIAL_WEIGHTS | {"layers.1.ffn.gate.tid2eid": table})
    )
    with pytest.raises(FileError, match=rf"tid2eid: .*0\.\.5, found {expert}$"):
        trunk["blk.1.ffn_gate_tid2eid.weight"]


# FP8 and FP4

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 9), spelled=st.booleans())
def test_fp8_and_fp4_are_values_times_their_blocks_scale(seed, width, spelled):
    draw = np.random.default_rng(seed)
    hidden = 32 * width  # below, at and above a block of 128
    config = hf.config(TRANSFORMERS_JSON | {"hidden_size": hidden})
    tensors = {
        name: np.zeros(spec.shape, np.int32 if spec.group == "table" else np.float32)
        for name, spec in schema.trunk(config).items()
    }
    state = {}
    for layer in range(config.layers):
        for name, gguf in OFFICIAL.items():
            values = tensors.get(f"blk.{layer}.{gguf}")
            for expert in range(config.experts if "*" in name else 1):
                if values is not None:
                    key = f"layers.{layer}.{name.replace('*', str(expert))}"
                    state[key] = values[expert] if "*" in name else values
    state |= {name: tensors[gguf] for name, gguf in OFFICIAL_TOP.items()}

    def scales(*shape):
        return np.exp2(draw.integers(-20, 20, shape))

    codes = draw.integers(0, 256, (32, hidden), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    eight = codes.view(ml_dtypes.float8_e4m3fn)
    eight_scale = scales(1, -(-hidden // 128))
    state["layers.0.attn.wq_a.weight"] = eight
    suffix = "weight_scale_inv" if spelled else "scale"
    kind = np.float32 if spelled else ml_dtypes.float8_e8m0fnu
    state[f"layers.0.attn.wq_a.{suffix}"] = eight_scale.astype(kind)

    pairs = draw.integers(-128, 128, (32, hidden // 2), dtype=np.int8)
    four_scale = scales(32, width)
    state["layers.1.ffn.experts.3.w3.weight"] = pairs
    state["layers.1.ffn.experts.3.w3.scale"] = four_scale.astype(
        ml_dtypes.float8_e8m0fnu
    )

    trunk, _ = hf.named(config, state)
    found8 = trunk["blk.0.attn_q_a.weight"]
    found4 = trunk["blk.1.ffn_up_exps.weight"]
    assert not found4[[0, 1, 2, 4, 5]].any()
    for row, column in draw.integers(0, (32, hidden), (200, 2)):
        assert (
            found8[row, column]
            == float(eight[row, column]) * eight_scale[0, column // 128]
        )
        byte = int(pairs[row, column // 2]) & 255
        nibble = byte >> 4 if column % 2 else byte & 15
        expected = E2M1[nibble & 7] * (-1) ** (nibble >> 3)
        assert found4[3, row, column] == expected * four_scale[row, column // 32]
    assert found8.dtype == found4.dtype == np.float32


def test_fp8_in_a_file(checkpoint):
    weight = np.full((32, 64), 1.5, ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), 0.25, ml_dtypes.float8_e8m0fnu)
    fp8 = {f"{WQ_A}.weight": weight, f"{WQ_A}.scale": scale}
    _, trunk, _ = hf.load(checkpoint(OFFICIAL_WEIGHTS | fp8))
    np.testing.assert_array_equal(
        trunk["blk.0.attn_q_a.weight"], np.full((32, 64), 0.375, np.float32)
    )


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(kind):
    sinks = np.array([0.5, -2, 3, 1], kind)
    state = OFFICIAL_WEIGHTS | {"layers.4.attn.attn_sink": sinks}
    trunk, _ = hf.named(CONFIG, state)
    assert trunk["blk.4.attn_sinks.weight"].dtype == np.float32
    np.testing.assert_array_equal(
        trunk["blk.4.attn_sinks.weight"], sinks.astype(np.float32)
    )
