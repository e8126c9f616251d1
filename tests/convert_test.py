"""`ds4jax convert`: what it writes, what it says, and that it leaves nothing half."""

import json
import weakref

import models
import numpy as np
import pytest
from absl.testing import flagsaver
from checkpoints import (
    CONFIG,
    MTP,
    OFFICIAL_WEIGHTS,
    TRANSFORMERS,
    TRANSFORMERS_JSON,
    TRUNK,
    write,
)
from tokenizers import pre_tokenizers

import ds4jax.experiments.convert  # noqa: F401  # its flags, before they are saved
from ds4jax import cli, gguf, imatrix, schema
from ds4jax.config import PLANS
from ds4jax.hf.weights import Weights
from ds4jax.quant import dequantize
from ds4jax.tokenizer import REQUIRED_SPECIALS, Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(BYTES) + 20


def tokenizer_json(**changes) -> dict:
    """Return a file whose specials are added tokens, with a gap before the last two."""
    vocab = {char: index for index, char in enumerate(BYTES)} | {"th": 256, "the": 257}
    places = [258, 259, 260, 261, VOCAB - 2, VOCAB - 1]
    added = zip(places, REQUIRED_SPECIALS, strict=True)
    model = {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]}
    return {
        "model": model | changes,
        "added_tokens": [{"id": i, "content": s, "special": True} for i, s in added],
    }


def resized(tensors):
    """Return the checkpoint with rows added until its vocabulary has VOCAB."""
    grown = dict(tensors)
    for name, values in tensors.items():
        if name in ("embed.weight", "head.weight") or name.endswith("tid2eid"):
            more = np.zeros((VOCAB - CONFIG.vocab, values.shape[1]), values.dtype)
            grown[name] = np.concatenate([values, more])
    return grown


@pytest.fixture
def run(tmp_path):
    """Return a function that converts a checkpoint of `tensors` in `tmp_path`."""
    root = tmp_path / "checkpoint"

    def convert(tensors, config=TRANSFORMERS_JSON, tokenizer=None, **changes) -> int:
        root.mkdir(exist_ok=True)
        (root / "config.json").write_text(json.dumps(config))
        write(root / "model.safetensors", tensors)
        if tokenizer is not None:
            (root / "tokenizer.json").write_text(json.dumps(tokenizer))
        values = {
            "hf": root,
            "out": tmp_path / "t.gguf",
            "mtp_out": tmp_path / "m.gguf",
        }
        flags = (values | changes).items()
        with flagsaver.flagsaver():
            return cli.main(["convert", *(f"--{k}={v}" for k, v in flags if v)])

    return convert


def written(root):
    return sorted(path.name for path in root.iterdir() if path.name != "checkpoint")


@pytest.mark.parametrize("types", ["f32", "f16"])  # the golden weights fit in f16
@pytest.mark.parametrize("tensors", [OFFICIAL_WEIGHTS, TRANSFORMERS], ids=["ds", "hf"])
def test_files_hold_the_checkpoint(run, tmp_path, types, tensors):
    tensors = {  # safetensors hold tables as int64
        name: values.astype(np.int64) if values.dtype == np.int32 else values
        for name, values in tensors.items()
    }
    assert run(tensors, types=types) == 0
    assert written(tmp_path) == ["m.gguf", "t.gguf"]
    config, trunk = gguf.load_trunk(tmp_path / "t.gguf")
    assert config == CONFIG
    for found, expected in (
        (trunk, TRUNK),
        (gguf.load_mtp(tmp_path / "m.gguf", config), MTP),
    ):
        assert set(found) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(np.asarray(found[name]), values, name)
    kinds = {t.type for t in gguf.read(tmp_path / "t.gguf").tensors.values()}
    assert kinds == {"F32", "I32", *(["F16"] if types == "f16" else [])}


def test_q8_0_is_ds4s_mixture(run, tmp_path):
    assert run(OFFICIAL_WEIGHTS, types="q8_0") == 0
    kinds = {k: t.type for k, t in gguf.read(tmp_path / "t.gguf").tensors.items()}
    assert kinds["blk.2.ffn_up_exps.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == kinds["blk.2.indexer.proj.weight"] == "F16"
    assert kinds["blk.2.attn_norm.weight"] == "F32"


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """Return a pair in F32 whose rows hold whole blocks of every format."""
    config = models.micro_config(
        vocab=280, hidden=256, expert_ffn=256, q_lora=256, o_lora=128, head_dim=128
    )
    paths = [tmp_path_factory.mktemp("pair") / name for name in ("t.gguf", "m.gguf")]
    for path, specs, extra in (
        (paths[0], schema.trunk(config), {"general.name": "sea", "tokenizer.x": [1]}),
        (paths[1], schema.mtp(config), {}),
    ):
        weights = models.lively_weights(specs, config, seed=1)
        gguf.write_model(path, config, weights, PLANS["f32"], extra)
    return paths


@pytest.fixture
def requantise(floats, tmp_path):
    """Return a function that converts that pair."""

    def convert(**changes) -> int:
        values = {
            "gguf": floats[0], "mtp": floats[1],
            "out": tmp_path / "t.gguf", "mtp_out": tmp_path / "m.gguf",
        }  # fmt: skip
        flags = (values | changes).items()
        with flagsaver.flagsaver():
            return cli.main(["convert", *(f"--{k}={v}" for k, v in flags if v)])

    return convert


def types_of(path) -> dict[str, str]:
    return {name: t.type for name, t in gguf.read(path).tensors.items()}


@pytest.mark.parametrize(
    "plan, gate, down", [("ds4-q2", "IQ2_XXS", "Q2_K"), ("ds4-q4", "Q4_K", "Q4_K")]
)
def test_a_file_is_written_again_in_ds4s_layout(
    requantise, floats, tmp_path, plan, gate, down
):
    """Types, values near the float ones, and what the file says of itself."""
    assert requantise(plan=plan) == 0
    trunk, mtp = types_of(tmp_path / "t.gguf"), types_of(tmp_path / "m.gguf")
    assert trunk["blk.1.ffn_gate_exps.weight"] == gate
    assert trunk["blk.1.ffn_up_exps.weight"] == gate
    assert trunk["blk.1.ffn_down_exps.weight"] == down
    assert trunk["output.weight"] == trunk["blk.1.ffn_up_shexp.weight"] == "Q8_0"
    assert trunk["blk.1.ffn_gate_inp.weight"] == trunk["token_embd.weight"] == "F16"
    assert {mtp[f"mtp.0.ffn_{x}_exps.weight"] for x in ("gate", "down")} == {"Q4_K"}
    assert mtp["mtp.0.ffn_gate_inp.weight"] == "F32"
    metadata = gguf.read(tmp_path / "t.gguf").metadata
    assert metadata["general.name"] == "sea" and "tokenizer.x" in metadata
    config, found = gguf.load_trunk(tmp_path / "t.gguf")
    before, expected = gguf.load_trunk(floats[0])
    assert config == before
    worst = {"F32": 1e-9, "I32": 0, "F16": 1e-3, "Q8_0": 0.01, "Q4_K": 0.1,
             "Q2_K": 0.35, "IQ2_XXS": 0.4}  # fmt: skip
    for name, values in expected.items():
        error = np.asarray(dequantize(found[name])) - np.asarray(values)
        bound = worst[trunk[name]] * np.sqrt(np.mean(np.square(values)))
        assert np.sqrt(np.mean(np.square(error))) <= bound, name


def test_an_importance_matrix_moves_the_errors(requantise, floats, tmp_path):
    """Columns that matter come out better; importances of another model are refused."""
    config, weights = gguf.load_trunk(floats[0])
    name = "blk.1.ffn_up_exps.weight"
    loud = np.ones((config.experts, config.hidden), np.float32)
    loud[:, ::2] = 100
    errors = []
    for importance in (loud, None):
        path = tmp_path / "i.gguf"
        if importance is not None:
            sums = imatrix.Sums(importance, np.ones(config.experts, np.float32))
            imatrix.write(path, {name: sums}, "sea", 1, 512)
        words = {} if importance is None else {"imatrix": path}
        assert requantise(plan="ds4-q2", **words) == 0
        found = gguf.load_trunk(tmp_path / "t.gguf")[1][name]
        error = np.square(np.asarray(dequantize(found)) - np.asarray(weights[name]))
        errors.append((error[..., ::2].mean(), error[..., 1::2].mean()))
    (loud_with, quiet_with), (loud_without, _) = errors
    assert loud_with < 0.9 * loud_without and loud_with < quiet_with


def test_the_tokenizer_comes_along(run, tmp_path):
    config = TRANSFORMERS_JSON | {"vocab_size": VOCAB}
    assert run(resized(OFFICIAL_WEIGHTS), config, tokenizer_json()) == 0
    tokenizer = Tokenizer.from_metadata(gguf.read(tmp_path / "t.gguf").metadata)
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.tokens[:256] == tuple(BYTES)
    assert tokenizer.merges == ("t h", "th e")
    assert tokenizer.encode("the")[-1] == 257
    assert tokenizer.tokens[270] == "[PAD 270]"
    assert tokenizer.end_think == VOCAB - 1
    assert "tokenizer.ggml.tokens" not in gguf.read(tmp_path / "m.gguf").metadata


def test_merges_may_be_strings(run, tmp_path):
    config = TRANSFORMERS_JSON | {"vocab_size": VOCAB}
    tokenizer = tokenizer_json(merges=["t h", "th e"])
    assert run(resized(OFFICIAL_WEIGHTS), config, tokenizer) == 0
    metadata = gguf.read(tmp_path / "t.gguf").metadata
    assert metadata["tokenizer.ggml.merges"] == ["t h", "th e"]


def test_what_is_left_out_is_said(run, tmp_path, capsys):
    assert run(OFFICIAL_WEIGHTS, mtp_out=None) == 0
    assert written(tmp_path) == ["t.gguf"]
    said = capsys.readouterr()
    assert "no tokenizer.json in" in said.err
    assert "--mtp_out=FILE writes it" in said.err
    assert said.out.startswith(f"{tmp_path / 't.gguf'}: {len(TRUNK)} tensors, ")


def test_one_tensor_is_in_memory_at_a_time(run, monkeypatch):
    assembled, original = {}, Weights.__getitem__

    def watched(self, name):
        assert not any(alive() is not None for alive in assembled.values()), name
        values = original(self, name)
        assembled[name] = weakref.ref(values)
        return values

    monkeypatch.setattr(Weights, "__getitem__", watched)
    assert run(OFFICIAL_WEIGHTS, types="q8_0") == 0
    assert set(assembled) == {*TRUNK, *MTP}


def spoiled(name, value):
    values = OFFICIAL_WEIGHTS[name].copy()
    values.flat[-1] = value
    return OFFICIAL_WEIGHTS | {name: values}


NO_MTP = {k: v for k, v in OFFICIAL_WEIGHTS.items() if not k.startswith("mtp.")}


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        # Found when half of the trunk, or all of it, is written.
        (spoiled("layers.1.ffn.gate.tid2eid", 6), {}, "tid2eid: expected expert ids"),
        (spoiled("mtp.0.norm.weight", np.nan), {}, "mtp.0.norm.weight"),
        (NO_MTP, {}, "has no MTP block; leave the flag out"),
        (OFFICIAL_WEIGHTS, {"mtp_out": "{}/./t.gguf"}, "expected another file than"),
        (OFFICIAL_WEIGHTS, {"mtp_out": "{}/checkpoint"}, "it is not a regular file"),
        (OFFICIAL_WEIGHTS, {"mtp_out": "{}/none/m.gguf"}, "No such file or directory"),
        (OFFICIAL_WEIGHTS, {"hf": "{}/none"}, "config.json: expected a JSON file"),
        (OFFICIAL_WEIGHTS, {"plan": "q3"}, "--plan=q3: value should be one of"),
        (OFFICIAL_WEIGHTS, {"gguf": "{}/t.gguf"}, "--hf: expected a checkpoint alone"),
        (OFFICIAL_WEIGHTS, {"imatrix": "{}/t.gguf"}, "t.gguf: "),
        (OFFICIAL_WEIGHTS, {"tokenizer": []}, "expected a tokenizer.json"),
        (
            OFFICIAL_WEIGHTS,
            {"tokenizer": tokenizer_json(type="Unigram")},
            "model.type: expected 'BPE', found 'Unigram'",
        ),
        (
            OFFICIAL_WEIGHTS,
            {"tokenizer": tokenizer_json()},
            "expected an id below vocab_size = 96, found 96",
        ),
        (
            resized(OFFICIAL_WEIGHTS),
            {
                "config": TRANSFORMERS_JSON | {"vocab_size": VOCAB},
                "tokenizer": tokenizer_json(merges=[["q", "q"]]),
            },
            "tokenizer.json: tokenizer.ggml.merges[0]: 'q q' needs 'qq'",
        ),
    ],
)
def test_a_refusal_is_one_line_and_leaves_all_as_it_was(
    run, tmp_path, capsys, tensors, changes, message
):
    (tmp_path / "t.gguf").write_text("an older file")
    changes = {
        k: v.format(tmp_path) if isinstance(v, str) else v for k, v in changes.items()
    }
    assert run(tensors, **changes) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ds4jax convert: ") and message in last
    assert written(tmp_path) == ["t.gguf"]
    assert (tmp_path / "t.gguf").read_text() == "an older file"
