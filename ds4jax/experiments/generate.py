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
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from ds4jax import gguf
from ds4jax.decode import driver
from ds4jax.errors import ConfigError, FileError
from ds4jax.experiments import model_flags, token_flags
from ds4jax.files import check_place, replacing
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

DEFAULT_PROMPT = "It was a bright morning, and the old man walked down to the"

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "File of text to continue, its last line end included."
)
_CHAT = flags.DEFINE_bool("chat", False, "Render the prompt as a chat's question.")
_THINK = flags.DEFINE_bool("think", False, "With --chat, ask for reasoning first.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "Most tokens to decode.", lower_bound=1
)
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
    """Continue the prompt that the flags name.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or the text does not fit in memory.
    """
    del argv
    for path in filter(None, (_STATS.value, _OUT_TOKENS.value)):
        check_place(Path(path))
    given = _read_prompt()
    modes = ["continuous", "plain"] if _COMPARE.value else [_MODE.value]
    if "continuous" in modes and not model_flags.mtp_path():
        raise ConfigError(
            "--mode=continuous: needs an MTP file to draft with; see --mtp"
        )
    with model_flags.within_memory():
        model = model_flags.load()
        tokenizer = _load_tokenizer()
        prompt = _encode(given, tokenizer, model.config.vocab)
        runs = [_decode(model, tokenizer, prompt, mode) for mode in modes]
    tokens, summary = runs[0]
    if _COMPARE.value:
        _print_verdict(runs)
    if _OUT_TOKENS.value:
        _write(_OUT_TOKENS.value, ",".join(map(str, tokens)) + "\n")
    if _STATS.value:
        _write(_STATS.value, json.dumps(dataclasses.asdict(summary), indent=1) + "\n")


def _read_prompt() -> str | list[int]:
    """Return the text or the ids to continue."""
    prompts = (_PROMPT, _PROMPT_FILE, token_flags.TOKENS)
    given = [flag.name for flag in prompts if flag.value is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names}: expected one prompt; leave the others out")
    if _THINK.value and not _CHAT.value:
        raise ConfigError("--think: expected --chat with it; add that or leave it out")
    if token_flags.TOKENS.value is not None:
        if _CHAT.value:
            raise ConfigError("--chat: expected text, found --tokens; leave one out")
        return token_flags.read_ids()
    if _PROMPT_FILE.value is not None:
        return token_flags.read_text(_PROMPT_FILE.value)
    return DEFAULT_PROMPT if _PROMPT.value is None else _PROMPT.value


def _load_tokenizer() -> Tokenizer | None:
    """Return the vocabulary of the trunk's file, or None if it has none."""
    path = model_flags.trunk_path()
    metadata = gguf.read(path).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    try:
        return Tokenizer.from_metadata(metadata)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from error


def _encode(
    given: str | list[int], tokenizer: Tokenizer | None, vocab: int
) -> list[int]:
    """Return the ids of a prompt."""
    if not isinstance(given, str):
        token_flags.check_ids(given, vocab)
        return given
    if tokenizer is None:
        raise FileError(
            f"{model_flags.trunk_path()}: has no vocabulary to read text with; give ids"
            " with --tokens"
        )
    if _CHAT.value:
        return tokenizer.chat(given, think=_THINK.value)
    return [tokenizer.bos, *tokenizer.encode(given)]


class _IdStream:
    """Shows ids where there is no vocabulary, in the place of a `TokenStream`."""

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def _decode(
    model: Model, tokenizer: Tokenizer | None, prompt: list[int], mode: str
) -> tuple[list[int], Summary]:
    """Decode in one mode, printing the text as it comes, then the summary."""
    depth = 1 if mode == "continuous" else 0
    limit = _MAX_TOKENS.value
    eos = tokenizer.eos if tokenizer else -1
    print(f"[{mode}] compiling ...", file=sys.stderr, flush=True)
    warm = driver.start(model, prompt, limit, depth)
    next(driver.stream(model, warm, depth, eos, every=1))

    before = time.perf_counter()
    carry = jax.block_until_ready(driver.start(model, prompt, limit, depth))
    prefill = time.perf_counter() - before
    text = tokenizer.stream() if tokenizer else _IdStream()
    before = time.perf_counter()
    for state, new in driver.stream(model, carry, depth, eos):
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
        shared_reads_per_token=counts["passes"] / len(tokens),
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
        f" ({saved / plain.target_passes:.0%})"
    )


def _write(path: str, text: str):
    with replacing(Path(path)) as part:
        part.write_text(text)
