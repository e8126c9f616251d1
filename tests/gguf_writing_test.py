"""Writing GGUF: what gguf-py and ds4jax read back, and what cannot be written."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

from ds4jax import quant, quantize, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError, FileError
from ds4jax.gguf import load_mtp, load_trunk, read, write, write_model, writing

MODEL = ModelConfig.tiny(
    vocab=32, hidden=64, layers=3, heads=2, compress_ratios=(0, 4, 128), hash_layers=1,
    q_lora=32, o_lora=32, o_groups=2, experts=4, experts_used=2, expert_ffn=32,
    index_heads=2,
)  # fmt: skip
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["Ġ", "a\x00", "<｜User｜>", ""],
    "tokenizer.ggml.merges": ["Ġ a"],
    "tokenizer.ggml.token_type": [1, 1, 3, 1],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
}


def weights_of(specs):
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, MODEL.experts, spec.shape)
        if spec.group == "table"
        else rng.standard_normal(spec.shape, np.float32)
        for name, spec in specs.items()
    }


def sample(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.parametrize("types", ["f32", "f16", "q8_0"])
def test_a_model_comes_back_as_it_was_encoded(tmp_path, types):
    trunk, mtp = tmp_path / "trunk.gguf", tmp_path / "mtp.gguf"
    plan = QuantPlan.named(types)
    expected_trunk = weights_of(schema.trunk(MODEL))
    expected_mtp = weights_of(schema.mtp(MODEL))
    write_model(trunk, MODEL, expected_trunk, plan, TOKENIZER)
    write_model(mtp, MODEL, expected_mtp, plan)
    config, found_trunk = load_trunk(trunk)
    assert config == MODEL
    found_mtp = load_mtp(mtp, config)
    for specs, found, expected in [
        (schema.trunk(MODEL), found_trunk, expected_trunk),
        (schema.mtp(MODEL), found_mtp, expected_mtp),
    ]:
        assert list(found) == list(specs)
        for name, spec in specs.items():
            ggml_type = plan.types[spec.group]
            if ggml_type == "I32":
                np.testing.assert_array_equal(found[name], expected[name])
                continue
            raw = gguf.quants.quantize(expected[name], Type[ggml_type])
            values = gguf.quants.dequantize(raw, Type[ggml_type])
            np.testing.assert_array_equal(quant.dequantize(found[name]), values)
    keys = read(trunk).metadata
    for key, value in TOKENIZER.items():
        np.testing.assert_array_equal(keys[key], value)
    assert "deepseek4.block_count" not in read(mtp).metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mtp.gguf", "trunk.gguf"]


def test_ds4s_types_are_those_of_the_plan(tmp_path):
    path = tmp_path / "trunk.gguf"
    weights = weights_of(schema.trunk(MODEL))
    write_model(path, MODEL, weights, QuantPlan.named("q8_0"))
    types = {name: t.type for name, t in read(path).tensors.items()}
    assert types["token_embd.weight"] == types["blk.1.indexer.proj.weight"] == "F16"
    assert types["blk.0.attn_q_a.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == types["blk.1.exp_probs_b.bias"] == "F32"
    assert types["blk.0.ffn_gate_tid2eid.weight"] == "I32"


@pytest.mark.parametrize("ggml_type", ["F32", "F16", "BF16", "Q8_0", "MXFP4"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_type_is_encoded_as_gguf_py_does(tmp_path, ggml_type, dtype):
    values = sample(3, 2, 64).astype(jnp.dtype(dtype))
    write(tmp_path / "x.gguf", {}, {"t": (values, ggml_type)})
    found = read(tmp_path / "x.gguf").tensors["t"]
    assert found.shape == (3, 2, 64) and found.type == ggml_type
    expected = gguf.quants.quantize(values.astype(np.float32), Type[ggml_type])
    assert found.data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("ggml_type", ["Q8_0", "MXFP4"])
def test_values_too_small_to_scale_stay_small(tmp_path, ggml_type):
    """gguf-py's MXFP4 encoder alone gives the first row the exponent 255, a NaN."""
    rows = [[1.5e-38] * 32, [1e-38] * 32, [1e-40] * 32, [0] * 32, [1] * 31 + [1e-40]]
    values = np.array(rows, np.float32)
    write(tmp_path / "x.gguf", {}, {"t": (values, ggml_type)})
    raw = read(tmp_path / "x.gguf").tensors["t"].data
    found = gguf.quants.dequantize(raw, Type[ggml_type])
    np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q4_K", "IQ2_XXS"])
@pytest.mark.parametrize("shape", [(512,), (2, 512), (3, 512)])
def test_importance_is_of_a_matrix_or_of_each(tmp_path, ggml_type, shape):
    """In the formats that gguf-py cannot encode; [3, 512] is of three matrices."""
    values = sample(3, 2, 512)
    path, weights = tmp_path / "x.gguf", np.abs(sample(*shape))
    put = lambda **more: write(path, {}, {"t": (values, ggml_type)}, **more)  # noqa: E731
    if shape == (2, 512):
        with pytest.raises(ConfigError, match=r"t: importance: .*found \(2, 512\)"):
            put(importance={"t": weights})
        return
    put(importance={"t": weights, "other": weights})
    found = read(path).tensors["t"].data
    for matrix, raw, own in zip(
        values, found, np.broadcast_to(weights, (3, 512)), strict=True
    ):
        expected = quantize.quantize(matrix, ggml_type, np.ascontiguousarray(own))
        np.testing.assert_array_equal(raw, expected)
    put()
    assert (read(path).tensors["t"].data != found).any()


@pytest.mark.parametrize("shape", [(512,), (5, 512)])
@pytest.mark.parametrize("ggml_type", ["F16", "Q8_0", "Q2_K"])
def test_a_stack_is_encoded_in_parts(tmp_path, monkeypatch, ggml_type, shape):
    """Two matrices at a time, and the last one alone, give the bytes of all at once."""
    path, importance = tmp_path / "x.gguf", {"t": np.abs(sample(*shape))}
    tensors = {"t": (sample(5, 2, 512), ggml_type), "u": (sample(3), "F32")}
    write(path, {}, tensors, importance=importance)
    whole, encoded, encode = path.read_bytes(), [], writing._encode

    def watched(what, values, *rest):
        encoded.append(len(values))
        return encode(what, values, *rest)

    monkeypatch.setattr(writing, "_encode", watched)
    monkeypatch.setattr(writing, "_PART", 2048)
    write(path, {}, tensors, importance=importance)
    assert encoded == [2, 2, 1, 3]
    assert path.read_bytes() == whole


def test_arrays_on_a_device_are_written(tmp_path):
    write(tmp_path / "x.gguf", {}, {"t": (jnp.arange(4.0), "F32")})
    found = read(tmp_path / "x.gguf").tensors["t"].data
    np.testing.assert_array_equal(found, np.arange(4, dtype=np.float32))


@pytest.mark.parametrize("alignment", [1, 32, 4096])
def test_tensors_start_at_multiples_of_the_alignment(tmp_path, alignment):
    path = tmp_path / "x.gguf"
    tensors = {
        "a": (sample(3), "F32"),
        "b": (sample(5), "F16"),
        "c": (sample(1), "F32"),
    }
    write(path, {"general.alignment": 7}, tensors, alignment=alignment)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == read(path).metadata["general.alignment"] == alignment
    assert all(t.data_offset % alignment == 0 for t in reader.tensors)
    for name, (values, ggml_type) in tensors.items():
        dtype = np.float16 if ggml_type == "F16" else np.float32
        found = read(path).tensors[name].data
        np.testing.assert_array_equal(found, values.astype(dtype))


def test_equal_arguments_give_equal_bytes(tmp_path):
    weights = weights_of(schema.trunk(MODEL))
    for name in ("a.gguf", "b.gguf"):
        write_model(tmp_path / name, MODEL, weights, QuantPlan.named("f16"), TOKENIZER)
    first, second = ((tmp_path / n).read_bytes() for n in ("a.gguf", "b.gguf"))
    assert first == second


def test_metadata_gets_the_types_that_ds4_expects(tmp_path):
    values = {
        "u": (7, [Value.UINT32]),
        "i": (-7, [Value.INT32]),
        "wide": (2**40, [Value.INT64]),
        "wider": (2**63, [Value.UINT64]),
        "f": (0.5, [Value.FLOAT32]),
        "huge": (1e300, [Value.FLOAT64]),
        "b": (False, [Value.BOOL]),
        "s": ("", [Value.STRING]),
        "u64": (np.uint64(7), [Value.UINT64]),
        "f64": (np.float64(0.1), [Value.FLOAT64]),
        "ints": ([1, -2], [Value.ARRAY, Value.INT32]),
        "floats": ((1.0, 0.5), [Value.ARRAY, Value.FLOAT32]),
        "u8s": (np.arange(3, dtype=np.uint8), [Value.ARRAY, Value.UINT8]),
        "texts": (["x", ""], [Value.ARRAY, Value.STRING]),
    }
    path = tmp_path / "x.gguf"
    keys = {key: value for key, (value, _) in values.items()}
    write(path, keys, {"t": (sample(2), "F32")}, name="a model")
    fields = gguf.GGUFReader(path).fields
    assert {key: fields[key].types for key in keys} == {
        key: types for key, (_, types) in values.items()
    }
    found = read(path).metadata
    assert found.pop("general.name") == "a model"
    for key, value in keys.items():
        np.testing.assert_array_equal(found[key], value)


UNWRITABLE = {
    "K-quant": (sample(2, 256), "Q6_K", "type: expected one of F32, .*, found 'Q6_K'"),
    "no type": (sample(2, 256), "q8", "type: expected one of F32, .*, found 'q8'"),
    "partial block": (
        sample(2, 48),
        "Q8_0",
        r"Q8_0 needs a last axis that is a multiple of 32, found shape \(2, 48\)",
    ),
    "scalar": (np.float32(1), "F32", r"1 to 4 axes, none empty, found shape \(\)"),
    "empty": (sample(0, 32), "F32", r"none empty, found shape \(0, 32\)"),
    "f16 overflow": (
        np.array([1, -65520], np.float32),
        "F16",
        "its largest magnitude, 65520, overflows F16; store it as F32",
    ),
    "bf16 overflow": (
        np.array([3.4e38], np.float32),
        "BF16",
        "3.4e.38, overflows BF16",
    ),
    "q8_0 overflow": (np.full(32, 9e6, np.float32), "Q8_0", "9e.06, overflows Q8_0"),
    "NaN": (
        np.array([1, np.nan], np.float32),
        "F32",
        "found NaN or infinity among its values",
    ),
    "beyond f32": (
        np.array([1e39], np.float64),
        "F32",
        "found NaN or infinity among its values",
    ),
    "ints as floats": (np.arange(32), "F32", "expected floats, found int64"),
    "floats as ints": (sample(4), "I32", "expected integers of 32 bits"),
    "wide ints": (np.array([2**31], np.int64), "I32", "expected integers of 32 bits"),
}


@pytest.mark.parametrize(
    "values, ggml_type, message", UNWRITABLE.values(), ids=UNWRITABLE
)
def test_what_cannot_be_stored_is_refused_and_leaves_the_old_file(
    tmp_path, values, ggml_type, message
):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")
    tensors = {"fine": (sample(64), "F32"), "bad": (values, ggml_type)}
    with pytest.raises(ConfigError, match=f"x.gguf: tensor bad: .*{message}"):
        write(path, {}, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("value", [[], None, {"a": 1}, [[1, 2]], ["a", 1], [2**70]])
def test_metadata_that_gguf_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="metadata key k: expected text, a number or"):
        write(tmp_path / "x.gguf", {"k": value}, {"t": (sample(2), "F32")})


def test_a_wrong_alignment_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="alignment 24: .*power of two"):
        write(tmp_path / "x.gguf", {}, {"t": (sample(2), "F32")}, alignment=24)


def test_places_that_cannot_be_written_are_named(tmp_path):
    tensors = {"t": (sample(2), "F32")}
    with pytest.raises(FileError, match="no/x.gguf: cannot be written: No such file"):
        write(tmp_path / "no" / "x.gguf", {}, tensors)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file/x.gguf: cannot be written: Not a dir"):
        write(tmp_path / "file" / "x.gguf", {}, tensors)
    (tmp_path / "dir").mkdir()
    with pytest.raises(FileError, match="dir: cannot be written: Is a directory"):
        write(tmp_path / "dir", {}, tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]


def test_weights_that_do_not_fit_the_architecture_are_refused(tmp_path):
    path, plan = tmp_path / "x.gguf", QuantPlan.named("f32")
    weights = weights_of(schema.trunk(MODEL))
    with pytest.raises(
        ConfigError, match=r"output_norm.weight: expected \(64,\), foun"
    ):
        write_model(path, MODEL, weights | {"output_norm.weight": sample(63)}, plan)
    with pytest.raises(ConfigError, match="x.weight: expected no such tensor"):
        write_model(path, MODEL, weights | {"x.weight": sample(63)}, plan)
    del weights["blk.2.attn_norm.weight"]
    with pytest.raises(ConfigError, match="attn_norm.weight: expected .*found no such"):
        write_model(path, MODEL, weights, plan)
    assert not list(tmp_path.iterdir())
