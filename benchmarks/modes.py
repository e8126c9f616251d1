"""Every way of decoding on the model that ships: what is accepted, and what it costs.

Counts and hashes only; nothing here is timed.  Plain decoding is the first run of each
prompt, and exact modes must commit its tokens.

Example:
    python benchmarks/modes.py --out=benchmarks/results/tiny_model/modes.csv
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags
from tqdm import tqdm

from ds4jax import assets, gguf
from ds4jax.decode import carry as carries
from ds4jax.decode import driver, oracles
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.modes import GREEDY, Decoding, Mode
from ds4jax.files import write_table
from ds4jax.model.deepseek import Model, build
from ds4jax.tokenizer import Tokenizer

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to decode.", lower_bound=1)

CONTEXT = 1024
"""Of every run, so that each mode compiles once."""

MODES = [GREEDY.mode] + [
    Mode(kind, depth, verifier)
    for kind in ("chained", "continuous")
    for verifier in ("exact", "batched")
    for depth in range(1, MAX_DEPTH + 1)
]


def run(model: Model, prompt: Sequence[int], mode: Mode) -> dict[str, object]:
    """Return a row of the table."""
    how = Decoding(mode=mode)
    carry = driver.prefill(model, driver.create(model, CONTEXT, how), prompt, how)
    carry = driver.run(model, carries.with_budget(carry, _TOKENS.value), how)
    tokens = driver.committed(carry)
    counts = carry.statistics.of()
    gaps = oracles.argmax_gaps(model, tokens, len(prompt), how, CONTEXT)
    places = [f"{share:.3f}" for share in carry.statistics.acceptance()]
    return {
        "mode": mode.kind,
        "depth": mode.depth,
        "verifier": mode.verifier,
        "tokens": counts["committed"],
        "passes": counts["passes"],
        "base_decodes": counts["decodes"],
        "shared_reads_per_token": f"{counts['passes'] / counts['committed']:.3f}",
    } | {
        f"accepted_at_{place + 1}": places[place] if place < mode.depth else ""
        for place in range(MAX_DEPTH)
    } | {
        "worst_gap": f"{gaps.max():.3g}",
        "sha256": driver.digest(tokens[len(prompt) :])[:16],
    }  # fmt: skip


def rows() -> Iterator[dict[str, object]]:
    """Yield the table's rows."""
    config, trunk = gguf.load_trunk(assets.trunk())
    model = build(config, trunk, gguf.load_mtp(assets.mtp(), config))
    tokenizer = Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)
    for name in assets.PROMPTS:
        text = assets.prompt(name).read_text()
        prompt = [tokenizer.bos, *tokenizer.encode(text)]
        for mode in MODES:
            yield {"prompt": name} | run(model, prompt, mode)


def main(argv: Sequence[str]):
    """Write the table; say so if an exact mode differs from plain decoding."""
    del argv
    table = list(tqdm(rows(), total=len(assets.PROMPTS) * len(MODES)))
    write_table(Path(_OUT.value), table)
    plain = {row["prompt"]: row["sha256"] for row in table if row["mode"] == "plain"}
    different = [
        f"{row['prompt']}, {row['mode']} {row['depth']}, {row['verifier']}"
        for row in table
        if row["sha256"] != plain[row["prompt"]]
    ]
    print(f"{len(table)} runs; other tokens than plain decoding's: {different or None}")
    return int(any(line.endswith("exact") for line in different))


if __name__ == "__main__":
    app.run(main)
