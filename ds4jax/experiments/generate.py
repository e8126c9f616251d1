"""Continue a prompt, speculatively or plainly.

Text appears as it is decoded; a summary of what it cost follows on the standard error.

Example:
    ds4jax generate --prompt='The sea was' --max_tokens=64
    ds4jax generate --compare
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ds4jax import assets, gguf
from ds4jax.decode import driver
from ds4jax.errors import ConfigError, FileError, TokenError
from ds4jax.model import deepseek
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

DEFAULT_PROMPT = "It was a bright morning, and the old man walked down to the"

_GGUF = flags.DEFINE_string("gguf", None, "Trunk file; the shipped one by default.")
_MTP = flags.DEFINE_string(
    "mtp", None, "MTP file; the shipped one by default, if the trunk is."
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File of text to continue.")
_TOKENS = flags.DEFINE_string(
    "tokens", None, "Token ids to continue: 1,2,3 or @FILE of them."
)
_CHAT = flags.DEFINE_bool("chat", False, "Render the prompt as a chat's question.")
_THINK = flags.DEFINE_bool("think", False, "With --chat, ask for reasoning first.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to decode.")
_MODE = flags.DEFINE_enum(
    "mode", "continuous", ["plain", "continuous"], "How to decode; same tokens."
)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "Decode in both modes and say whether the tokens are the same."
)
_STATS = flags.DEFINE_string("stats", None, "File to write the summary to, as JSON.")
_OUT_TOKENS = flags.DEFINE_string("out_tokens", None, "File to write token ids to.")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did and cost; times in seconds, compilation left out.

    Attributes:
      mode: how it decoded.
      prompt_tokens, tokens: read and committed.
      target_passes: passes of the trunk while decoding.
      shared_reads_per_token: target passes per committed token.
      drafted, accepted: draft tokens verified, and committed.
      prefill_tokens_per_second, decode_tokens_per_second: rates.
      sha256: of the committed ids, as little-endian int32.
      device: kind of the device.
    """

    mode: str
    prompt_tokens: int
    tokens: int
    target_passes: int
    shared_reads_per_token: float
    drafted: int
    accepted: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    sha256: str
    device: str


def main(argv: Sequence[str]):
    """Run the command."""
    for path in filter(None, (_STATS.value, _OUT_TOKENS.value)):
        if not Path(path).resolve().parent.is_dir():
            raise FileError(f"{path}: its folder does not exist; make it first")
    if _MAX_TOKENS.value < 1:
        raise ConfigError(
            f"--max_tokens: expected at least 1, found {_MAX_TOKENS.value}"
        )
    model, tokenizer = _load()
    prompt = _read_prompt(tokenizer)
    modes = ["continuous", "plain"] if _COMPARE.value else [_MODE.value]
    if "continuous" in modes and not model.mtp:
        raise ConfigError(
            "--mode=continuous: needs an MTP file to draft with; see --mtp"
        )
    runs = [_decode(model, tokenizer, prompt, mode) for mode in modes]
    tokens, summary = runs[0]
    if _COMPARE.value:
        _print_verdict(runs)
    if _OUT_TOKENS.value:
        _write(_OUT_TOKENS.value, ",".join(map(str, tokens)) + "\n")
    if _STATS.value:
        _write(_STATS.value, json.dumps(dataclasses.asdict(summary), indent=1) + "\n")


def _load() -> tuple[Model, Tokenizer]:
    trunk = _GGUF.value or assets.trunk()
    mtp = _MTP.value or (None if _GGUF.value else assets.mtp())
    config, weights = gguf.load_trunk(trunk)
    head = gguf.load_mtp(mtp, config) if mtp else None
    tokenizer = Tokenizer.from_metadata(gguf.read(trunk).metadata)
    return deepseek.build(config, weights, head), tokenizer


def _read_prompt(tokenizer: Tokenizer) -> list[int]:
    given = [f for f in (_PROMPT, _PROMPT_FILE, _TOKENS) if f.value is not None]
    if len(given) > 1:
        names = " and ".join(f"--{flag.name}" for flag in given)
        raise ConfigError(f"{names}: expected one prompt; leave the others out")
    if _TOKENS.value is not None:
        if _CHAT.value:
            raise ConfigError("--chat: expected text, found --tokens; leave one out")
        return _parse_ids(_TOKENS.value)
    text = _PROMPT.value if _PROMPT.value is not None else DEFAULT_PROMPT
    if _PROMPT_FILE.value is not None:
        text = _read_text(_PROMPT_FILE.value)
    if _CHAT.value:
        return tokenizer.chat(text, think=_THINK.value)
    return [tokenizer.bos, *tokenizer.encode(text)]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as text: {error}") from None


def _parse_ids(words: str) -> list[int]:
    if words.startswith("@"):
        words = _read_text(words[1:])
    try:
        return [int(word) for word in words.replace(",", " ").split()]
    except ValueError as error:
        raise TokenError(f"--tokens: expected ids such as 1,2,3: {error}") from None


def _decode(
    model: Model, tokenizer: Tokenizer, prompt: list[int], mode: str
) -> tuple[list[int], Summary]:
    """Decode in one mode, printing the text as it comes, then the summary."""
    depth = 1 if mode == "continuous" else 0
    limit = _MAX_TOKENS.value
    print(f"[{mode}] compiling ...", file=sys.stderr, flush=True)
    warm = driver.start(model, prompt, limit, depth)
    jax.block_until_ready(driver.run(model, warm, depth, tokenizer.eos, 1))

    before = time.perf_counter()
    carry = jax.block_until_ready(driver.start(model, prompt, limit, depth))
    prefill = time.perf_counter() - before
    text = tokenizer.stream()
    before = time.perf_counter()
    for state, new in driver.stream(model, carry, depth, tokenizer.eos):
        print("".join(text.push(token) for token in new), end="", flush=True)
        carry = state
    decode = time.perf_counter() - before
    print(text.flush(), flush=True)
    tokens = driver.committed(carry)[len(prompt) :]
    counts = carry.statistics.of()
    summary = Summary(
        mode=mode,
        prompt_tokens=len(prompt),
        tokens=len(tokens),
        target_passes=counts["passes"],
        shared_reads_per_token=counts["passes"] / max(len(tokens), 1),
        drafted=counts["drafted"],
        accepted=counts["accepted"],
        prefill_tokens_per_second=len(prompt) / prefill,
        decode_tokens_per_second=len(tokens) / decode,
        sha256=hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest(),
        device=jax.devices()[0].device_kind,
    )
    _print_summary(summary)
    return tokens, summary


def _print_summary(run: Summary):
    print(
        f"[{run.mode}] {run.tokens} tokens in {run.target_passes} target passes"
        f" ({run.shared_reads_per_token:.3f} shared reads per token),"
        f" {run.accepted} of {run.drafted} drafts accepted;"
        f" prefill {run.prefill_tokens_per_second:.0f} tokens/s,"
        f" decode {run.decode_tokens_per_second:.1f} tokens/s on {run.device};"
        f" sha256 {run.sha256[:16]}",
        file=sys.stderr,
        flush=True,
    )


def _print_verdict(runs: Sequence[tuple[list[int], Summary]]):
    (tokens, fast), (plain_tokens, plain) = runs
    saved = plain.target_passes - fast.target_passes
    same = "identical" if tokens == plain_tokens else "DIFFERENT"
    print(
        f"continuous and plain are {same}: {fast.tokens} tokens,"
        f" {saved} of {plain.target_passes} target passes saved"
        f" ({saved / max(plain.target_passes, 1):.0%})"
    )


def _write(path: str, text: str):
    """Write a file beside its place and move it there."""
    folder = Path(path).resolve().parent
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
