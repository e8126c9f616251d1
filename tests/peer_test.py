"""transformers, given the weights that ship, decodes the tokens that ds4jax does."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="make peer installs it, in .venv-peer")
pytest.importorskip("transformers", reason="make peer installs it, in .venv-peer")

SCRIPT = Path(__file__).parent.parent / "benchmarks/peer.py"


@pytest.mark.heavy
def test_the_same_tokens_at_some_speed(tmp_path):
    out = tmp_path / "peer.csv"
    words = [f"--out={out}", "--tokens=12", "--rounds=2"]
    subprocess.run([sys.executable, SCRIPT, *words], check=True, timeout=1200)
    with out.open(newline="") as lines:
        table = list(csv.DictReader(lines))
    ways = ["transformers", "plain", "one row", "continuous 1", "continuous 4"]
    assert [row["way"] for row in table] == ways
    for row in table:
        assert row["parts_at"] == "" and float(row["tokens_per_second"]) > 0
        assert row["torch"] and row["transformers"] and row["jax"] and row["commit"]
