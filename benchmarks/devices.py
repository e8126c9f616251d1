"""Whether a CPU and a GPU say the same: the shipped model on the shipped prompts.

They sum in different orders and, in float32, the GPU's kernels take operands of 22
bits, so logits differ; greedy decoding commits the same tokens until two logits are as
close as that.  `difference` is of the logits of the prompt, over the largest of
them; `same` of the `tokens` committed come before the first that differs, where the
GPU's two highest logits were `gap` apart, over the largest one.

Example:
    JAX_PLATFORMS=cuda,cpu python benchmarks/devices.py \\
        --out=benchmarks/results/tiny_model/devices.csv
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ds4jax import assets, gguf, xla_flags
from ds4jax.decode import carry as carries
from ds4jax.decode import driver
from ds4jax.decode.modes import GREEDY
from ds4jax.experiments import environment
from ds4jax.files import write_table
from ds4jax.model import deepseek
from ds4jax.tokenizer import Tokenizer

_OUT = flags.DEFINE_string("out", None, "CSV file to write.", required=True)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens to commit after each prompt.")

PROMPTS = "copy", "technical", "prose"


def shipped(dtype: str) -> deepseek.Model:
    """Return the model that ships, for operands of a type, on JAX's default device."""
    config, trunk = gguf.load_trunk(assets.trunk())
    config = dataclasses.replace(config, dtype=dtype)
    return deepseek.build(config, trunk)


@jax.jit
def next_logits(model: deepseek.Model, tokens: jax.Array, cache: Any) -> Any:
    """Return the logits [V] after one more token, and the state."""
    out = model.modules().trunk(tokens[None, None], cache)
    return out.logits[0, 0], out.cache


def read(model: deepseek.Model, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits [T, V] of a text."""
    cache = carries.create(model.config, len(tokens), mtp=False).cache
    found = []
    for token in tokens:
        logits, cache = next_logits(model, jnp.int32(token), cache)
        found.append(np.asarray(logits))
    return np.stack(found)


def main(argv: Sequence[str]):
    """Compare and write the table."""
    del argv
    devices = jax.devices("gpu")[0], jax.devices("cpu")[0]
    tokenizer = Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)
    table = []
    for dtype in ("float32", "bfloat16"):
        models = []
        for device in devices:
            with jax.default_device(device):
                models.append(shipped(dtype))
        for text in PROMPTS:
            ids = tokenizer.encode(assets.prompt(text).read_text())
            prompt = [tokenizer.bos, *ids][:200]
            texts = []
            for device, model in zip(devices, models, strict=True):
                with jax.default_device(device):
                    carry = driver.start(model, prompt, _TOKENS.value, GREEDY)
                    run = driver.run(model, carry, GREEDY)
                    texts.append(driver.committed(run)[len(prompt) :])
            pairs = enumerate(zip(*texts, strict=True))
            same = next((i for i, (a, b) in pairs if a != b), _TOKENS.value)
            logits = []
            for device, model in zip(devices, models, strict=True):
                with jax.default_device(device):
                    logits.append(read(model, [*prompt, *texts[0][:same]]))
            largest = np.max(abs(logits[1]))
            gpu, cpu = (array[: len(prompt)] for array in logits)
            second, first = np.sort(logits[0][-1])[-2:]
            row = {"dtype": dtype, "text": text, "tokens": _TOKENS.value, "same": same}
            row["difference"] = f"{np.max(abs(gpu - cpu)) / largest:.2e}"
            differs = same < _TOKENS.value
            row["gap"] = f"{(first - second) / largest:.2e}" if differs else ""
            print(row, flush=True)
            table.append(row | environment.describe())
            write_table(Path(_OUT.value), table)


if __name__ == "__main__":
    xla_flags.set_flags()
    app.run(main)
