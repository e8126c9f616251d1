"""What a model loses in each layout of ds4's files: held-out text and drafts accepted.

The float files that `ds4jax train --export` leaves are converted to every plan, with an
importance matrix and without, and measured as by `ds4jax evaluate`.  --folder keeps the
converted files, --out has a row for every plan and class of text.

Example:
    python benchmarks/plans.py --gguf=runs/tiny/trunk.gguf --mtp=runs/tiny/mtp.gguf \
        --imatrix=runs/tiny/imatrix.gguf --corpus=DIR --folder=runs/tiny \
        --out=benchmarks/results/tiny_model/plans.csv
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import app, flags

from ds4jax import gguf
from ds4jax.files import make_folder
from ds4jax.model import deepseek
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import Document, read_corpus
from ds4jax.train.report import Scope, evaluate

_GGUF = flags.DEFINE_string("gguf", None, "Trunk, in floats.", required=True)
_MTP = flags.DEFINE_string("mtp", None, "MTP head, in floats.", required=True)
_IMATRIX = flags.DEFINE_string("imatrix", None, "Importance matrix.", required=True)
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text.", required=True)
_FOLDER = flags.DEFINE_string("folder", None, "Where files go.", required=True)
_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_WINDOWS = flags.DEFINE_integer(
    "windows", None, "Windows of each class; all by default.", lower_bound=1
)

RUNS = [
    ("f32", False),
    ("q8_0", False),
    ("ds4-q4", True),
    ("ds4-q4", False),
    ("ds4-q2", True),
    ("ds4-q2", False),
]
"""Plans, and whether the importance matrix is used; Q8_0 has no use for it."""


def convert(plan: str, imatrix: bool) -> tuple[Path, Path]:
    """Return the trunk and the MTP head in a plan."""
    folder = make_folder("folder", _FOLDER.value)
    name = f"{plan}{'-imatrix' if imatrix else ''}.gguf"
    trunk, mtp = folder / f"trunk-{name}", folder / f"mtp-{name}"
    words = [f"--gguf={_GGUF.value}", f"--mtp={_MTP.value}", f"--plan={plan}",
             f"--out={trunk}", f"--mtp_out={mtp}"]  # fmt: skip
    if imatrix:
        words.append(f"--imatrix={_IMATRIX.value}")
    subprocess.run(
        [sys.executable, "-m", "ds4jax", "convert", *words],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return trunk, mtp


def rows(documents: Sequence[Document]) -> Iterator[dict[str, object]]:
    """Yield the table's rows."""
    for plan, imatrix in RUNS:
        paths = convert(plan, imatrix)
        config, trunk = gguf.load_trunk(paths[0], deepseek.place)
        head = gguf.load_mtp(paths[1], config, deepseek.place)
        model = deepseek.build(config, trunk, head)
        tokenizer = Tokenizer.from_metadata(gguf.read(paths[0]).metadata)
        print(f"{plan}{' with the importance matrix' if imatrix else ''}:", flush=True)
        found = evaluate(model, tokenizer, documents, Scope(windows=_WINDOWS.value))
        for kind, score in found.items():
            decoded = score["decoded"]
            yield {
                "plan": plan,
                "imatrix": int(imatrix),
                "trunk_bytes": paths[0].stat().st_size,
                "mtp_bytes": paths[1].stat().st_size,
                "class": kind,
                "tokens": score["tokens"],
                "bits_per_byte": f"{score['bits_per_byte']:.4f}",
                "trunk_nats": f"{score['trunk']:.4f}",
                "mtp_nats": f"{score['mtp']:.4f}",
                "accepted": f"{score['accepted']:.4f}",
                "accepted_ds4": f"{score['accepted_ds4']:.4f}",
                "decoded_accepted": decoded["accepted"],
                "decoded_drafted": decoded["drafted"],
                "decoded_committed": decoded["committed"],
                "decoded_passes": decoded["passes"],
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }


def main(argv: Sequence[str]):
    """Write the table, after every plan what is known of it."""
    del argv
    table = []
    for row in rows(read_corpus(_CORPUS.value)):
        table.append(row)
        write_table(Path(_OUT.value), table)


if __name__ == "__main__":
    app.run(main)
