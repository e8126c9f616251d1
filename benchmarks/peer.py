"""Tokens per second on the CPU: transformers' DeepSeek-V4 and ds4jax, the same weights.

Both get the shipped trunk's dequantised weights in float32, the same prompt and the
same number of threads, and decode greedily, a token at a time from a cache.  Reading
the prompt is not timed.  Every round times each way once, the order turned from round
to round; the first round is dropped.  Before that the tokens are compared: where they
part, the gap is by how much transformers' own logits prefer its token there.

transformers is as installed, its attention "eager"; `torch.topk` may take another
of two equals than the lowest index, which ds4jax takes.

Example:
    python benchmarks/peer.py --out=benchmarks/results/tiny_model/peer.csv
"""
# pyright: reportMissingImports=false
# make lint has neither torch nor transformers.

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from ds4jax import assets, gguf, xla_flags
from ds4jax.decode import driver
from ds4jax.decode.carry import MAX_DEPTH, DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode
from ds4jax.experiments import environment
from ds4jax.experiments.arm_runs import decode_one_row
from ds4jax.files import write_table
from ds4jax.hf import exporting
from ds4jax.model.deepseek import Model, build
from ds4jax.quant import dequantize
from ds4jax.tokenizer import Tokenizer

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens to decode.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds, the first dropped.", lower_bound=2)
_PROMPT = flags.DEFINE_enum("prompt", "prose", list(assets.PROMPTS), "Which prompt.")

PEER = "transformers"
DEEPEST = Decoding(mode=Mode("continuous", MAX_DEPTH))
Arm = Callable[[], tuple[float, list[int]]]
"""Decodes once; returns the seconds it took, and the tokens."""


class Transformers:
    """The peer: its model, and greedy decoding from its own cache."""

    def __init__(self, settings: dict[str, Any], weights: Mapping[str, np.ndarray]):
        """Build it from `exporting.settings` and values by GGUF name."""
        config = transformers.DeepseekV4Config(**settings)
        model = transformers.DeepseekV4ForCausalLM._from_config(
            config, attn_implementation="eager"
        ).float()
        tables = {"int32": np.int64}  # as its embedding of ids wants them
        state = {
            name: torch.from_numpy(x.astype(tables.get(str(x.dtype), np.float32)))
            for name, x in exporting.state(model.state_dict(), weights).items()
        }
        model.load_state_dict(state)
        self.model = model.eval()

    @torch.inference_mode()
    def decode(
        self, prompt: Sequence[int], tokens: int
    ) -> tuple[float, list[int], np.ndarray]:
        """Return the seconds, the tokens, and the logits [tokens, V] they were of."""
        cache = transformers.DynamicCache(config=self.model.config)
        step = functools.partial(self.model, past_key_values=cache, use_cache=True)
        logits = step(input_ids=torch.tensor([list(prompt)])).logits[:, -1]
        chosen, seen = [], []
        start = time.perf_counter()
        for _ in range(tokens):
            token = logits.argmax(-1, keepdim=True)
            chosen.append(token)
            seen.append(logits)
            logits = step(input_ids=token).logits[:, -1]
        seconds = time.perf_counter() - start
        return seconds, torch.cat(chosen)[:, 0].tolist(), torch.cat(seen).numpy()


def timed(
    run: Callable[[Model, DecodeCarry], DecodeCarry],
    model: Model,
    prompt: Sequence[int],
    how: Decoding,
) -> tuple[float, list[int]]:
    """Return the seconds and tokens of `run` on a carry that has read the prompt."""
    carry = driver.start(model, prompt, _TOKENS.value, how)
    jax.block_until_ready(carry)
    start = time.perf_counter()
    carry = jax.block_until_ready(run(model, carry))
    return time.perf_counter() - start, driver.committed(carry)[len(prompt) :]


def arms(model: Model, peer: Transformers, prompt: list[int]) -> dict[str, Arm]:
    """Return the ways to be compared, the peer first."""

    def ours(how, run=driver.run):
        run = functools.partial(run, decoding=how)
        return functools.partial(timed, run, model, prompt, how)

    limit = jnp.int32(_TOKENS.value)
    return {
        PEER: lambda: peer.decode(prompt, _TOKENS.value)[:2],
        "plain": ours(GREEDY),
        "one row": ours(GREEDY, functools.partial(decode_one_row, limit=limit)),
        "continuous 1": ours(CONTINUOUS),
        f"continuous {MAX_DEPTH}": ours(DEEPEST),
    }


def parting(
    expected: list[int], logits: np.ndarray, found: list[int]
) -> tuple[int | str, str]:
    """Return the first place where tokens differ, and the gap there; or blanks."""
    for place, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        if theirs != ours:
            return place, f"{logits[place, theirs] - logits[place, ours]:.3g}"
    return "", ""


def summary(name: str, values: list[float]) -> dict[str, str]:
    """Return median, least and most of a column."""
    middle = statistics.median(values)
    return {
        name: f"{middle:.4g}",
        f"{name}_min": f"{min(values):.4g}",
        f"{name}_max": f"{max(values):.4g}",
    }


def measure(ways: dict[str, Arm]) -> dict[str, list[float]]:
    """Return the tokens per second of each way, by rounds, without the first."""
    speeds = {name: [] for name in ways}
    names = list(ways)
    for number in range(_ROUNDS.value):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds, tokens = ways[name]()
            speeds[name].append(len(tokens) / seconds)
    return {name: rounds[1:] for name, rounds in speeds.items()}


def main(argv: Sequence[str]):
    """Write the table, and print it."""
    del argv
    xla_flags.set_flags()
    threads = len(os.sched_getaffinity(0))  # what XLA takes for itself
    torch.set_num_threads(threads)
    config, trunk = gguf.load_trunk(assets.trunk())
    model = build(config, trunk, gguf.load_mtp(assets.mtp(), config))
    values = {
        name: np.asarray(w if "tid2eid" in name else dequantize(w))
        for name, w in trunk.items()
    }
    peer = Transformers(exporting.settings(config), values)
    tokenizer = Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)
    text = assets.prompt(_PROMPT.value).read_text()
    prompt = [tokenizer.bos, *tokenizer.encode(text)]

    _, expected, logits = peer.decode(prompt, _TOKENS.value)
    ways = arms(model, peer, prompt)
    parts = {name: parting(expected, logits, way()[1]) for name, way in ways.items()}
    speeds = measure(ways)
    where = environment.describe() | {
        "threads": str(threads),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    table = []
    for name, rounds in speeds.items():
        ratios = [a / b for a, b in zip(rounds, speeds[PEER], strict=True)]
        part, gap = parts[name]
        row = {"way": name, "prompt": _PROMPT.value, "prompt_tokens": len(prompt)}
        row |= {"tokens": _TOKENS.value, "rounds": len(rounds)}
        row |= summary("tokens_per_second", rounds) | summary("ratio", ratios)
        table.append(row | {"parts_at": part, "gap_there": gap} | where)
        print(
            f"{name:>12}: {row['tokens_per_second']} tokens/s, {row['ratio']} times"
            f" {PEER} ({row['ratio_min']} to {row['ratio_max']}); "
            + (f"parts at token {part}, gap {gap}" if gap else "the same tokens")
        )
    write_table(Path(_OUT.value), table)


if __name__ == "__main__":
    app.run(main)
