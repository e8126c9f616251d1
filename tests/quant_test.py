"""Every block format against gguf-py, bit for bit."""

import dataclasses
import math

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds4jax import quant
from ds4jax.errors import ConfigError

EVERY_FORMAT = pytest.mark.parametrize("name", quant.FORMATS)


def block(name: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def random_blocks(name: str, seed: int, leading: tuple[int, ...], blocks: int):
    row_bytes = blocks * block(name)[1]
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*leading, row_bytes), dtype=np.uint8)


def reference(name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


def assert_same_bits(found, expected: np.ndarray):
    """Compare bit patterns, signed zeros included; any NaN equals any NaN."""
    found = np.asarray(found)
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        found[numbers].view(np.uint32), expected[numbers].view(np.uint32)
    )


@EVERY_FORMAT
@settings(deadline=None, max_examples=5)
@example(seed=0, leading=(), blocks=1)
@example(seed=1, leading=(3, 64), blocks=4)
@given(
    seed=st.integers(0, 2**32 - 1),
    leading=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    blocks=st.integers(1, 3),
)
def test_random_bytes_dequantise_to_the_bits_of_gguf_py(name, seed, leading, blocks):
    raw = random_blocks(name, seed, leading, blocks)
    tensor = quant.pack(name, raw)
    expected = reference(name, raw)
    assert tensor.shape == expected.shape == (*leading, blocks * block(name)[0])
    assert tensor.ndim == len(leading) + 1
    assert_same_bits(jax.jit(quant.dequantize)(tensor), expected)


@st.composite
def rows_of_blocks(draw, name: str) -> np.ndarray:
    """Draw bytes that hypothesis shrinks, or a great many from a seed."""
    size = block(name)[1]
    leading = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    if draw(st.booleans()):
        return random_blocks(name, draw(st.integers(0, 2**32 - 1)), leading, 3)
    count = math.prod(leading) * size
    raw = draw(st.binary(min_size=count, max_size=count))
    return np.frombuffer(raw, np.uint8).reshape(*leading, size)


@EVERY_FORMAT
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_unpacking_gives_the_bytes_that_were_packed(name, data):
    """Any bytes, NaN with payloads among the scales; seen red with nibbles swapped."""
    raw = data.draw(rows_of_blocks(name))
    found = quant.unpack(quant.pack(name, raw))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, raw)


def random_planes(name: str, seed: int, leading: tuple[int, ...]):
    """Return a tensor of any planes that two blocks can hold, drawn plane by plane."""
    rng = np.random.default_rng(seed)
    tensor = quant.pack(name, np.zeros((*leading, 2 * block(name)[1]), np.uint8))
    planes = {}
    for plane, values in tensor.planes.items():
        raw = rng.integers(0, 256, (*leading, values.nbytes // 6), dtype=np.uint8)
        if name == "Q4_K" and plane in ("scales", "mins"):
            raw &= 63
        planes[plane] = raw.view(values.dtype)
    return dataclasses.replace(tensor, planes=planes)


@EVERY_FORMAT
@pytest.mark.parametrize("on_device", [False, True])
def test_packing_gives_the_planes_that_were_unpacked(name, on_device):
    for seed in range(20):
        tensor = random_planes(name, seed, (2, 3))
        place = jnp.asarray if on_device else np.asarray
        found = quant.pack(name, quant.unpack(jax.tree.map(place, tensor)))
        assert found.planes.keys() == tensor.planes.keys()
        for plane, values in tensor.planes.items():
            assert found.planes[plane].dtype == values.dtype
            np.testing.assert_array_equal(
                found.planes[plane].view(np.uint8), values.view(np.uint8)
            )


@pytest.mark.parametrize("plane", ["scales", "mins"])
def test_scales_that_q4_k_cannot_hold_are_refused(plane):
    tensor = quant.pack("Q4_K", random_blocks("Q4_K", 0, (3,), 1))
    tensor.planes[plane][2, 5] = 64
    with pytest.raises(ConfigError, match=f"Q4_K: {plane}: expected 6 bits, found 64"):
        quant.unpack(tensor)


SCALE_OFFSETS = {
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q4_K": [0, 2],
    "Q6_K": [208],
    "IQ2_XXS": [0],
}


@pytest.mark.parametrize("name", SCALE_OFFSETS)
def test_every_float16_scale_keeps_its_bits(name):
    """All 65,536 scales: zeros of both signs, subnormals, infinities and NaNs."""
    scales = np.arange(2**16, dtype="<u2").reshape(64, 1024)
    size = block(name)[1]
    raw = random_blocks(name, 7, (64,), 1024).reshape(64, 1024, size)
    for shift, offset in enumerate(SCALE_OFFSETS[name]):
        rolled = np.roll(scales, 12345 * shift)
        raw[..., offset : offset + 2] = rolled[..., None].view(np.uint8)
    raw = raw.reshape(64, -1)
    tensor, expected = quant.pack(name, raw), reference(name, raw)
    assert_same_bits(quant.dequantize(tensor), expected)
    assert_same_bits(jax.jit(quant.dequantize)(tensor), expected)


def test_every_mxfp4_code_keeps_its_bits():
    """All 256 exponents (subnormal results and overflow too) with all 16 codes."""
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:] = np.arange(16) * 17
    tensor = quant.pack("MXFP4", raw)
    assert_same_bits(quant.dequantize(tensor), reference("MXFP4", raw))
    assert_same_bits(jax.jit(quant.dequantize)(tensor), reference("MXFP4", raw))


@EVERY_FORMAT
def test_dequantise_in_one_program_with_a_product_keeps_the_bits(name):
    """Fusion with a consumer must not contract across the dequantised value."""
    raw = random_blocks(name, 3, (4,), 2)
    x = np.random.default_rng(4).standard_normal(2 * block(name)[0], np.float32)

    @jax.jit
    def both(tensor):
        values = quant.dequantize(tensor)
        return values, values * x + values

    found, _ = both(quant.pack(name, raw))
    assert_same_bits(found, reference(name, raw))


@EVERY_FORMAT
def test_gathering_experts_commutes_with_dequantising(name):
    raw = random_blocks(name, 11, (6, 5), 2)
    tensor = quant.pack(name, raw)
    ids = jnp.asarray([[5, 0], [3, 3]])

    @jax.jit
    def gather(tensor, ids):
        chosen = jax.tree.map(lambda plane: plane[ids], tensor)
        assert chosen.shape == (2, 2, *tensor.shape[1:])
        return quant.dequantize(chosen)

    device = jax.tree.map(jnp.asarray, tensor)
    assert_same_bits(gather(device, ids), reference(name, raw)[np.asarray(ids)])


@EVERY_FORMAT
def test_planes_are_contiguous_and_cost_what_the_blocks_cost(name):
    raw = random_blocks(name, 2, (3,), 8)
    tensor = quant.pack(name, raw)
    for plane in tensor.planes.values():
        assert plane.flags.c_contiguous and plane.shape[0] == 3
    unpacked = 4 if name == "Q4_K" else 0  # its 6-bit scales and minima become bytes
    assert tensor.nbytes == raw.nbytes + 3 * 8 * unpacked


def test_pack_copies_so_that_a_file_may_be_closed():
    raw = random_blocks("Q8_0", 2, (3,), 8)
    tensor = quant.pack("Q8_0", raw)
    assert not any(np.shares_memory(raw, plane) for plane in tensor.planes.values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_plain_array_is_cast(dtype):
    array = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    found = quant.dequantize(array)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, array.astype(np.float32))


def test_a_tensor_passes_through_jit_with_its_format_static():
    tensor = quant.pack("Q4_K", random_blocks("Q4_K", 2, (3,), 1))
    through = jax.jit(lambda q: q)(tensor)
    assert through.format == "Q4_K"
    assert through.shape == (3, 256)


def test_unknown_formats_and_partial_blocks_are_refused():
    with pytest.raises(ConfigError, match="Q8_0, Q2_K.*found 'Q5_K'"):
        quant.pack("Q5_K", np.zeros(176, np.uint8))
    with pytest.raises(ConfigError, match=r"whole 34-byte blocks, found uint8 \(33,\)"):
        quant.pack("Q8_0", np.zeros(33, np.uint8))
