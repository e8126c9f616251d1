"""`ds4jax inspect` on files that the test writes."""

import subprocess
import sys

import numpy as np
import pytest

from ds4jax import gguf, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError
from ds4jax.experiments import footprint, inspect

TINY = ModelConfig.tiny()


def write(path, specs):
    weights = {
        name: np.zeros(s.shape, np.int32 if s.group == "table" else np.float32)
        for name, s in specs.items()
    }
    gguf.write_model(path, TINY, weights, QuantPlan.named("q8_0"))
    return path


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inspect") / "t.gguf", schema.trunk(TINY))


def cells(text: str, title: str) -> list[list[str]]:
    """Return the words of each line of the table `title`."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in lines]


def test_trunk_tells_architecture_and_bytes(trunk):
    file = gguf.read(trunk)
    text = inspect.report(file, 4096)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    count = len(schema.trunk(TINY))
    assert text.startswith(f"{trunk}: trunk, {count} tensors, {total:,} bytes (")
    architecture = cells(text, "architecture")
    assert ["hidden", "256"] in architecture
    assert ["compress_ratios", "0", "0", "4", "128", "4", "128"] in architecture
    assert not {"kv_rounding", "dtype"} & {row[0] for row in architecture}
    for title in ("bytes by type", "bytes by group"):
        rows = cells(text, title)
        assert sum(int(row[-3]) for row in rows) == count
        assert sum(int(row[-2].replace(",", "")) for row in rows) == total
    assert {row[0] for row in cells(text, "bytes by type")} == {
        "Q8_0", "F16", "F32", "I32",
    }  # fmt: skip


def test_trunk_tells_what_a_pass_reads(trunk):
    file = gguf.read(trunk)
    sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    one, two = cells(inspect.report(file, 4096), "weight bytes that one pass reads")
    assert one[2] == f"{footprint.bytes_read(sizes, TINY, 1):,.0f}"
    assert two[2] == f"{footprint.bytes_read(sizes, TINY, 2):,.0f}"
    assert (one[3], one[4]) == ("x1.000", "2")
    assert two[4] == "3.667"  # 2 + 2 (1 - 2 / 12)


def test_tensors_are_listed_when_asked_for(trunk):
    file = gguf.read(trunk)
    assert "output_norm.weight" not in inspect.report(file, 4096)
    rows = cells(inspect.report(file, 4096, list_tensors=True), "tensors")
    assert len(rows) == len(file.tensors)
    assert ["blk.2.indexer.proj.weight", "F16", "4x256", "2,048"] in rows


def test_an_mtp_block_has_no_architecture_of_its_own(tmp_path):
    path = write(tmp_path / "m.gguf", schema.mtp(TINY))
    text = inspect.report(gguf.read(path), 4096)
    assert text.startswith(f"{path}: MTP block, 32 tensors, ")
    assert "architecture" not in text and "reads" not in text
    assert ["MTP", "projections", "2"] in [r[:3] for r in cells(text, "bytes by group")]


def test_a_file_without_an_architecture_is_refused(tmp_path):
    path = tmp_path / "bare.gguf"
    gguf.write(path, {}, {"token_embd.weight": (np.zeros((2, 2), np.float32), "F32")})
    with pytest.raises(ConfigError, match="bare.gguf: .*deepseek4.* is missing"):
        inspect.report(gguf.read(path), 4096)


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "ds4jax", "inspect", *map(str, words)],
        capture_output=True,
        text=True,
    )


def test_the_command_prints_the_report(trunk):
    done = run(trunk, "--tensors")
    expected = inspect.report(gguf.read(trunk), 32768, list_tensors=True) + "\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    done = run(tmp_path / "absent.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ds4jax inspect: {tmp_path}/absent.gguf: ")
    assert done.stderr.count("\n") == 1
