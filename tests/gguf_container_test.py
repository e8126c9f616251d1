"""Reading the container: what gguf-py writes, and every way a file can be wrong."""

import datetime
import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ds4jax.errors import FileError
from ds4jax.gguf import read

SCALARS = {
    Value.UINT8: 200,
    Value.INT8: -100,
    Value.UINT16: 60000,
    Value.INT16: -30000,
    Value.UINT32: 4 * 10**9,
    Value.INT32: -2 * 10**9,
    Value.UINT64: 2**63 + 1,
    Value.INT64: -(2**62),
    Value.FLOAT32: 0.1,
    Value.FLOAT64: 0.1,
    Value.BOOL: True,
    Value.STRING: "größe",
}
BLOCKS = (Type.Q8_0, Type.Q2_K, Type.Q4_K, Type.Q6_K, Type.IQ2_XXS, Type.MXFP4)


@pytest.fixture(scope="module")
def by_gguf_py(tmp_path_factory):
    """Every value type, alone and in a list, and every tensor type, by gguf-py."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "deepseek4")
    for kind, value in SCALARS.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, Value.ARRAY, kind)
    rng = np.random.default_rng(0)
    for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8"):
        writer.add_tensor(name, rng.integers(-9, 9, (3, 2, 5)).astype(name))
    for kind in (*BLOCKS, Type.BF16):
        row = gguf.quants.quant_shape_to_byte_shape((4, 512), kind)
        blocks = rng.integers(0, 256, row, dtype=np.uint8)
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_gguf_py_wrote(by_gguf_py):
    file = read(by_gguf_py)
    assert file.path == by_gguf_py
    fields = gguf.GGUFReader(by_gguf_py).fields
    assert [k for k in fields if not k.startswith("GGUF.")] == list(file.metadata)
    for key, value in file.metadata.items():
        expected = fields[key].contents()
        if isinstance(value, np.ndarray):
            dtype = gguf.GGUFReader.gguf_scalar_to_np[fields[key].types[-1]]
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, expected)
        else:
            assert type(value) is type(expected)
            assert value == expected


def test_tensors_are_the_bytes_of_the_file(by_gguf_py):
    file = read(by_gguf_py)
    expected = gguf.GGUFReader(by_gguf_py).tensors
    assert [t.name for t in expected] == list(file.tensors)
    for theirs in expected:
        ours = file.tensors[theirs.name]
        assert ours.name == theirs.name
        assert ours.type == theirs.tensor_type.name
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])
        assert ours.nbytes == theirs.n_bytes
        assert not ours.data.flags.writeable
        if ours.type == "BF16":
            assert ours.data.dtype.name == "bfloat16" and ours.data.shape == ours.shape
        else:
            assert ours.data.dtype == theirs.data.dtype
        assert ours.data.tobytes() == theirs.data.tobytes()


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, *ggml_shape: int, kind: int = Type.F32, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(ggml_shape)}Q", len(ggml_shape), *ggml_shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def build(keys=(), tensors=(), data: bytes = b"", version=3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(keys))
    header = b"GGUF" + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


ARRAY, STRING, U8, U32 = Value.ARRAY, Value.STRING, Value.UINT8, Value.UINT32
BLOCK = bytes(128)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


MALFORMED = {
    "not GGUF": (b"PK\3\4" + bytes(60), r"not a GGUF file.*PK"),
    "three bytes": (b"GGU", "not a GGUF file"),
    "only the magic": (b"GGUF", "truncated: version needs 4 bytes at byte 4.* has 4"),
    "version 2": (build(version=2), "GGUF version 2; only version 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd key count": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        f"metadata count: expected at most .*, found {2**63}",
    ),
    "absurd tensor count": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0),
        "tensor count: expected at most",
    ),
    "fewer keys than said": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + key("a", U8, b"\1"),
        "truncated: length of a metadata key needs 8",
    ),
    "absurd text": (build([key("a", STRING, struct.pack("<Q", 2**62))]), "'a'.*most"),
    "text past the end": (
        build([key("a", STRING, struct.pack("<Q", 1000))]),
        "truncated: metadata key 'a' needs 1000 bytes",
    ),
    "absurd list": (build([key("a", ARRAY, array(U8, 2**60))]), "items of .*'a'.*most"),
    "list past the end": (
        build([key("a", ARRAY, array(U32, 2**20))]),
        "truncated: metadata key 'a' needs 4194304 bytes",
    ),
    "list of lists": (
        build([key("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]),
        "'a' is a list of lists",
    ),
    "unknown value type": (build([key("a", 13, b"\1")]), "'a' has unknown type 13"),
    "key not UTF-8": (build([key(b"\xff", U8, b"\1")]), "a metadata key.*not UTF-8"),
    "long key": (build([key("k" * 2000, U8, b"\1")]), "most 1024, found 2000"),
    "duplicate key": (build([key("a", U8, b"\1")] * 2), "key 'a' is there twice"),
    "alignment zero": (
        build([key("general.alignment", U32, bytes(4))]),
        "general.alignment: expected a power of two, found 0",
    ),
    "alignment text": (
        build([key("general.alignment", STRING, text("32"))]),
        "general.alignment: expected a power of two, found str",
    ),
    "duplicate tensor": (build([], [tensor("t", 4)] * 2, BLOCK), "'t' is there twice"),
    "unknown tensor type": (
        build([], [tensor("t", 4, kind=4)], BLOCK),
        "tensor 't' has unknown type 4",
    ),
    "no axes": (build([], [tensor("t")], BLOCK), "1 to 4 axes, found 0"),
    "five axes": (build([], [tensor("t", *[1] * 5)], BLOCK), "1 to 4 axes, found 5"),
    "zero axis": (build([], [tensor("t", 4, 0)], BLOCK), r"'t' is empty.*\(0, 4\)"),
    "product beyond 64 bits": (
        build([], [tensor("t", 2**62, 2**62)], BLOCK),
        f"'t' points outside the file: it ends at byte {96 + 4 * 2**124}",
    ),
    "partial block": (
        build([], [tensor("t", 48, kind=Type.Q8_0)], BLOCK),
        r"'t': Q8_0 rows are multiples of 32 values, found shape \(48,\)",
    ),
    "data past the end": (
        build([], [tensor("t", 33)], BLOCK),
        "'t' points outside the file: it ends at byte 196, the file has 192",
    ),
    "offset past the end": (
        build([], [tensor("t", 4, offset=2**63)], BLOCK),
        "'t' points outside",
    ),
    "offset not aligned": (
        build([], [tensor("t", 4, offset=4)], BLOCK),
        "'t': offset 4 is not a multiple of general.alignment = 32",
    ),
    "overlap": (
        build([], [tensor("s", 16), tensor("t", 4, offset=32)], BLOCK),
        "tensors 's' and 't' overlap",
    ),
}


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_builder_of_malformed_files_builds_good_ones(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(
        build(
            [key("a", ARRAY, array(STRING, 2, text("x") + text("")))],
            [tensor("t", 4, 2), tensor("s", 4, offset=32)],
            np.arange(12, dtype="<f4").tobytes(),
        )
    )
    file = read(path)
    assert file.metadata == {"a": ["x", ""]}
    expected = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(file.tensors["t"].data, expected)
    np.testing.assert_array_equal(file.tensors["s"].data, [8, 9, 10, 11])


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileError, match="No such file"):
        read(tmp_path / "missing.gguf")
    with pytest.raises(FileError, match="not a regular file"):
        read(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FileError, match="the file is empty"):
        read(tmp_path / "empty.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    content = build(
        [
            key("general.alignment", U32, struct.pack("<I", 32)),
            key("a.text", STRING, text("deepseek4")),
            key("a.texts", ARRAY, array(STRING, 2, text("x") + text("yz"))),
            key("a.numbers", ARRAY, array(U32, 3, bytes(12))),
            key("a.float", Value.FLOAT32, struct.pack("<f", 1.5)),
        ],
        [tensor("s", 4, 2), tensor("t", 32, kind=Type.Q8_0, offset=32)],
        bytes(range(66)),
    )
    return content, tmp_path_factory.mktemp("fuzz") / "file.gguf"


@settings(
    max_examples=400,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(edits=[], cut=0)
@given(
    edits=st.lists(st.tuples(st.integers(0, 319), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 340),
)
def test_a_corrupt_header_is_read_or_refused_and_nothing_else(small, edits, cut):
    content, path = small
    corrupt = bytearray(content)
    for position, byte in edits:
        corrupt[position] = byte
    path.write_bytes(corrupt[: len(corrupt) - cut])
    try:
        file = read(path)
    except FileError as error:
        assert edits or cut
        assert "\n" not in str(error) and len(str(error)) < 3000
    else:
        for found in file.tensors.values():
            found.data.tobytes()  # a view past the end would kill the process
