"""Loading trunks and MTP blocks of every type, and refusing the flawed ones."""

import math

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ds4jax import quant, schema
from ds4jax.config import ModelConfig
from ds4jax.errors import FileError
from ds4jax.gguf import load_mtp, load_trunk, metadata
from ds4jax.gguf.loading import find_flaw

# Every kind of layer; rows of 256 so that K-quants fit.
MODEL = ModelConfig.tiny(
    vocab=32, layers=4, heads=4, compress_ratios=(0, 4, 128, 4), hash_layers=1,
    q_lora=256, o_lora=128, o_groups=2, experts=4, experts_used=2, expert_ffn=256,
    index_heads=2,
)  # fmt: skip

Q2 = {"experts": "IQ2_XXS", "down": "Q2_K", "dense": "Q8_0", "plain": "F16"}
"""ds4's q2 variant."""


def stored(spec: schema.TensorSpec, ggml_type: str, rng) -> np.ndarray:
    """Return random content as it lies in a file, every scale finite."""
    if spec.group == "table":
        return rng.integers(0, MODEL.experts, spec.shape, np.int32)
    values = rng.standard_normal(spec.shape, np.float32)
    if ggml_type in ("F32", "F16", "BF16", "Q8_0", "MXFP4"):
        return gguf.quants.quantize(values, Type[ggml_type])
    row = gguf.quants.quant_shape_to_byte_shape(spec.shape, Type[ggml_type])
    blocks = rng.integers(0, 256, row, dtype=np.uint8)
    blocks = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[Type[ggml_type]][1])
    for offset in {"IQ2_XXS": [0], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q6_K": [208]}[
        ggml_type
    ]:
        scale = rng.random((len(blocks), 1)).astype("<f2")
        blocks[:, offset : offset + 2] = scale.view(np.uint8)
    return blocks.reshape(row)


def contents(specs, types) -> dict[str, tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    found = {}
    for name, spec in specs.items():
        others = {"vector": "F32", "table": "I32", "down": types["experts"]}
        ggml_type = (others | types)[spec.group]
        found[name] = stored(spec, ggml_type, rng), ggml_type
    return found


def save(path, keys, tensors):
    """Write blocks as they are, with gguf-py alone."""
    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        elif not isinstance(value, str):
            writer.add_uint32(key, int(value))
    for name, (raw, ggml_type) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=Type[ggml_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def trunk(tmp_path):
    """Return a function that writes a trunk after `change(tensors)`."""

    def make(change=lambda tensors: None, types=Q2):
        tensors = contents(schema.trunk(MODEL), types)
        change(tensors)
        return save(tmp_path / "trunk.gguf", metadata(MODEL), tensors)

    return make


@pytest.fixture
def mtp(tmp_path):
    def make(change=lambda tensors: None, types=Q2, model=MODEL):
        tensors = contents(schema.mtp(model), types)
        change(tensors)
        return save(tmp_path / "mtp.gguf", {}, tensors)

    return make


def assert_loaded(weights, tensors):
    assert weights.keys() == tensors.keys()
    for name, (raw, ggml_type) in tensors.items():
        weight = weights[name]
        if ggml_type == "I32":
            np.testing.assert_array_equal(weight, raw)
            continue
        expected = gguf.quants.dequantize(raw, Type[ggml_type])
        assert weight.shape == expected.shape
        if isinstance(weight, quant.QuantTensor):
            assert weight.format == ggml_type
        else:
            dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[ggml_type]
            assert weight.dtype.name == dtype
        np.testing.assert_array_equal(quant.dequantize(weight), expected)


@pytest.mark.parametrize(
    "types",
    [
        Q2,
        {"experts": "Q4_K", "dense": "Q8_0", "plain": "F32"},
        {"experts": "MXFP4", "dense": "BF16", "plain": "BF16"},
        {"experts": "Q6_K", "dense": "Q4_K", "plain": "Q8_0"},
    ],
    ids=["q2", "q4", "mxfp4-bf16", "q6"],
)
def test_a_trunk_and_its_mtp_block_load_with_the_values_of_gguf_py(trunk, mtp, types):
    config, weights = load_trunk(trunk(types=types))
    assert config == MODEL
    assert_loaded(weights, contents(schema.trunk(MODEL), types))
    weights = load_mtp(mtp(types=types), config)
    assert_loaded(weights, contents(schema.mtp(MODEL), types))


def test_one_kind_of_file_in_place_of_the_other_is_said(trunk, mtp):
    with pytest.raises(FileError, match="mtp.gguf: this is an MTP file; expected a tr"):
        load_trunk(mtp())
    with pytest.raises(FileError, match="trunk.gguf: this is a trunk; expected an MTP"):
        load_mtp(trunk(), MODEL)


def test_an_mtp_block_of_another_model_is_said(mtp):
    path = mtp(model=ModelConfig.tiny())
    with pytest.raises(
        FileError,
        match=r"tensor mtp.0.\S+: expected shape .*, found .*: this MTP file belongs to"
        " another model",
    ):
        load_mtp(path, MODEL)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, raw, ggml_type):
    return lambda tensors: tensors.update({name: (raw, ggml_type)})


def patch(name, index, value, dtype=None):
    """Set one item of a tensor's stored content, seen as `dtype`."""

    def change(tensors):
        raw = tensors[name][0]
        (raw if dtype is None else raw.view(dtype)).flat[index] = value

    return change


GATE, DOWN = "blk.3.ffn_gate_exps.weight", "blk.3.ffn_down_exps.weight"
TABLE = "blk.0.ffn_gate_tid2eid.weight"
INF = float("inf")

FLAWED = {
    "missing": (
        drop("blk.2.attn_sinks.weight"),
        r"tensor blk.2.attn_sinks.weight is missing: expected F32 of shape \(4,\)",
    ),
    "missing bias": (drop("blk.1.exp_probs_b.bias"), "exp_probs_b.bias is missing"),
    "unexpected": (
        put("blk.4.attn_sinks.weight", np.zeros(2, np.float32), "F32"),
        "unexpected tensor 'blk.4.attn_sinks.weight'",
    ),
    "shape": (
        put("output_norm.weight", np.zeros(128, np.float32), "F32"),
        r"output_norm.weight: expected shape \(256,\), found \(128,\)",
    ),
    "vector type": (
        put("output_norm.weight", np.zeros(256, np.float16), "F16"),
        "output_norm.weight: expected type F32, found F16",
    ),
    "table type": (
        put(TABLE, np.zeros((32, 2), np.int64), "I64"),
        "tid2eid.weight: expected type I32, found I64",
    ),
    "matrix type": (
        put("blk.0.attn_kv.weight", np.zeros((128, 8 * 18), np.uint8), "Q4_0"),
        "attn_kv.weight: expected type F32 or F16 .*, found Q4_0",
    ),
    "gate unlike up": (
        put(GATE, np.zeros((4, 256, 84), np.uint8), "Q2_K"),
        f"tensors {GATE} and blk.3.ffn_up_exps.weight: expected one type, found Q2_K"
        " and IQ2_XXS",
    ),
    "f32 NaN": (
        patch("blk.0.attn_norm.weight", 7, np.nan),
        r"tensor blk.0.attn_norm.weight \(F32\): found NaN or infinity among its val",
    ),
    "f32 -inf": (patch("blk.0.attn_sinks.weight", 0, -INF), "attn_sinks.*infinity"),
    "f16 inf": (
        patch("token_embd.weight", 99, INF),
        r"token_embd.weight \(F16\): found NaN or infinity among its values",
    ),
    "f16 NaN": (patch("token_embd.weight", -1, np.nan), "token_embd.weight .F16.: .*N"),
    "Q8_0 scale": (
        patch("output.weight", 17 * 3, INF, "<f2"),
        r"output.weight \(Q8_0\): found NaN or infinity among its block scales \(d\)",
    ),
    "IQ2_XXS scale": (
        patch(GATE, 33 * 1023, np.nan, "<f2"),
        rf"{GATE} \(IQ2_XXS\): found NaN or infinity among its block scales \(d\)",
    ),
    "Q2_K minimum": (
        patch(DOWN, 42 * 5 + 41, -INF, "<f2"),
        rf"{DOWN} \(Q2_K\): found NaN or infinity among its block scales \(dmin\)",
    ),
    "MXFP4 exponent": (
        lambda tensors: tensors.update(
            {DOWN: (np.full((4, 256, 8 * 17), 255, np.uint8), "MXFP4")}
        ),
        rf"{DOWN} \(MXFP4\): found NaN among its block scales \(exponent 255\)",
    ),
    "expert id too high": (
        patch(TABLE, 5, 4),
        f"{TABLE}: expected expert ids in 0..3, found 0..4",
    ),
    "expert id negative": (patch(TABLE, 5, -1), "ids in 0..3, found -1..3"),
}


@pytest.mark.parametrize("change, message", FLAWED.values(), ids=FLAWED)
def test_a_flawed_trunk_is_refused_naming_the_tensor(trunk, change, message):
    path = trunk(change)
    with pytest.raises(FileError, match=message) as caught:
        load_trunk(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_flawed_mtp_block_is_refused_naming_the_tensor(mtp):
    path = mtp(patch("mtp.0.enorm.weight", 0, np.nan))
    with pytest.raises(FileError, match=r"mtp.0.enorm.weight \(F32\): found NaN"):
        load_mtp(path, MODEL)
    path = mtp(drop("mtp.0.exp_probs_b.bias"))
    with pytest.raises(FileError, match="mtp.0.exp_probs_b.bias is missing"):
        load_mtp(path, MODEL)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_value_that_is_not_finite_is_a_flaw_and_no_other(dtype):
    """All patterns of the top 16 bits, each alone among ordinary values."""
    dtype = jnp.dtype(dtype)
    patterns = np.arange(2**16, dtype=np.uint16)
    if dtype.itemsize == 4:
        patterns = patterns.astype(np.uint32) << 16
    for pattern in patterns.view(dtype)[:: 7 if dtype.itemsize == 4 else 1]:
        flaw = find_flaw(np.array([1, -2, pattern, -0.0], dtype))
        assert bool(flaw) is not math.isfinite(pattern)
