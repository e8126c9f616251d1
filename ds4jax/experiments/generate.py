"""Continue a prompt, speculatively or plainly.

Text appears as it is decoded; a summary of what it cost follows on the standard error.

--mode, --depth and --verifier choose a way of decoding.  --mtp_draft, --mtp_margin or
--quality choose one as ds4 does, with its DS4_MTP_... environment switches.

Example:
    ds4jax generate --prompt='The sea was' --max_tokens=64
    ds4jax generate --mode=chained --depth=2 --compare
    DS4_MTP_CONTINUOUS=1 ds4jax generate --mtp_draft=2
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from ds4jax.decode import driver, stops
from ds4jax.decode.modes import GREEDY
from ds4jax.decode.precedence import Logs
from ds4jax.decode.stops import Stops
from ds4jax.errors import ConfigError, FileError
from ds4jax.experiments import cycle_log, decoding_flags, model_flags, token_flags
from ds4jax.experiments.decoding_flags import Choice
from ds4jax.files import check_place, replacing
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

DEFAULT_PROMPT = "It was a bright morning, and the old man walked down to the"

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
flags.adopt_module_key_flags(decoding_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "File of text to continue, its last line end included."
)
_CHAT = flags.DEFINE_bool("chat", False, "Render the prompt as a chat's question.")
_THINK = flags.DEFINE_bool("think", False, "With --chat, ask for reasoning first.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "Most tokens to decode.", lower_bound=1
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "Text to end after; may be given more than once."
)
_COMPARE = flags.DEFINE_bool(
    "compare", False, "Decode plainly too, and say whether the tokens are the same."
)
_STATS = flags.DEFINE_string("stats", None, "File to write the summary to, as JSON.")
_OUT_TOKENS = flags.DEFINE_string("out_tokens", None, "File to write token ids to.")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did and cost; times in seconds, compilation left out.

    Attributes:
      mode, depth, verifier: how it decoded.
      output_class: what the tokens are, see `modes.OutputClass`.
      prompt_tokens, tokens: read and committed.
      target_passes: passes of the trunk while decoding.
      shared_reads_per_token: target passes per committed token, those among them that
        a stop took back.
      base_decodes: those of them that were a chained cycle's base pass.
      cold_cycles: continuous cycles without an anchor.
      drafted, accepted: draft tokens verified, and committed.
      accepted_by_place: share accepted of the drafts at each place of the chain.
      prefill_tokens_per_second, decode_tokens_per_second: rates.
      sha256: of the committed ids, as little-endian int32.
      device: kind of the device.
    """

    mode: str
    depth: int
    verifier: str
    output_class: str
    prompt_tokens: int
    tokens: int
    target_passes: int
    shared_reads_per_token: float
    base_decodes: int
    cold_cycles: int
    drafted: int
    accepted: int
    accepted_by_place: list[float]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    sha256: str
    device: str


def main(argv: Sequence[str]) -> int:
    """Continue the prompt that the flags name.

    Returns:
      1 if --compare finds other tokens where there should be none, else 0.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or the text does not fit in memory.
    """
    del argv
    for path in filter(None, (_STATS.value, _OUT_TOKENS.value)):
        check_place(Path(path))
    given = _read_prompt()
    choice = decoding_flags.choose(mtp=model_flags.mtp_path() is not None)
    choices = [choice]
    if _COMPARE.value:
        if not choice.decoding.depth:
            raise ConfigError("--compare: expected a mode that drafts, found plain")
        choices.append(_plainly(choice))
    if _STOP.value and choice.logs != Logs():
        raise ConfigError("--stop: expected no log of cycles; unset DS4_MTP_..._LOG")
    for note in choice.notes:
        print(note, file=sys.stderr)
    with model_flags.within_memory():
        model = model_flags.load()
        tokenizer = model_flags.load_tokenizer()
        prompt = _encode(given, tokenizer, model.config.vocab)
        runs = [_decode(model, tokenizer, prompt, choice) for choice in choices]
    tokens, summary = runs[0]
    if _OUT_TOKENS.value:
        _write(_OUT_TOKENS.value, ",".join(map(str, tokens)) + "\n")
    if _STATS.value:
        _write(_STATS.value, json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    if not _COMPARE.value:
        return 0
    same = _print_verdict(runs)
    return int(not same and choice.decoding.mode.verifier == "exact")


def _plainly(choice: Choice) -> Choice:
    """Return plain decoding of the same text."""
    decoding = dataclasses.replace(choice.decoding, mode=GREEDY.mode)
    sampled = choice.output_class == "sampled"
    return Choice(decoding, "sampled" if sampled else "G")


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
    model: Model, tokenizer: Tokenizer | None, prompt: list[int], choice: Choice
) -> tuple[list[int], Summary]:
    """Decode, printing the text as it comes, then the summary."""
    decoding, mode = choice.decoding, choice.decoding.mode
    limit = _MAX_TOKENS.value
    eos = tokenizer.eos if tokenizer else -1
    ends = Stops(_STOP.value, tokenizer)
    # To log drafts, plain decoding has to keep a head's state as well.
    start = lambda: driver.start(  # noqa: E731
        model, prompt, limit, decoding, decoding_flags.seed(), choice.logs != Logs()
    )
    print(f"[{mode.kind}] compiling ...", file=sys.stderr, flush=True)
    warm, _ = next(driver.stream(model, start(), decoding, eos, every=1))
    if _STOP.value:
        driver.rewind(model, warm, len(prompt), decoding)

    before = time.perf_counter()
    carry = jax.block_until_ready(start())
    prefill = time.perf_counter() - before
    if choice.logs != Logs():
        log = lambda line: print(f"\n{line}", end="", file=sys.stderr)  # noqa: E731
        pieces = cycle_log.stream(model, carry, decoding, eos, choice.logs, log)
    else:
        pieces = stops.stream(model, carry, decoding, eos, ends)
    text = tokenizer.stream() if tokenizer else _IdStream()
    before = time.perf_counter()
    for state, new in pieces:
        print("".join(text.push(token) for token in new), end="", flush=True)
        carry = state
    decode = time.perf_counter() - before
    print(text.flush(), flush=True)
    tokens = driver.committed(carry)[len(prompt) :]
    counts = carry.statistics.of()
    summary = Summary(
        mode=mode.kind,
        depth=decoding.depth,
        verifier=mode.verifier,
        output_class=choice.output_class,
        prompt_tokens=len(prompt),
        tokens=len(tokens),
        target_passes=counts["passes"],
        shared_reads_per_token=counts["passes"] / counts["committed"],
        base_decodes=counts["decodes"],
        cold_cycles=counts["boots"],
        drafted=counts["drafted"],
        accepted=counts["accepted"],
        accepted_by_place=carry.statistics.acceptance()[: decoding.depth],
        prefill_tokens_per_second=len(prompt) / prefill,
        decode_tokens_per_second=len(tokens) / decode,
        sha256=driver.digest(tokens),
        device=jax.devices()[0].device_kind,
    )
    _print_summary(summary)
    return tokens, summary


def _name(run: Summary) -> str:
    near = ", batched" if run.verifier == "batched" else ""
    return f"{run.mode} {run.depth}{near}" if run.depth else run.mode


def _print_summary(run: Summary):
    places = ", ".join(f"{share:.0%}" for share in run.accepted_by_place)
    by_place = f" (by place {places})" if run.depth > 1 else ""
    print(
        f"[{_name(run)}] {run.tokens} tokens in {run.target_passes} target passes"
        f" ({run.shared_reads_per_token:.3f} shared reads per token),"
        f" {run.accepted} of {run.drafted} drafts accepted{by_place};"
        f" prefill {run.prefill_tokens_per_second:.0f} tokens/s,"
        f" decode {run.decode_tokens_per_second:.1f} tokens/s on {run.device};"
        f" sha256 {run.sha256[:16]}",
        file=sys.stderr,
        flush=True,
    )


def _print_verdict(runs: Sequence[tuple[list[int], Summary]]) -> bool:
    """Say whether two runs have the same tokens."""
    (tokens, fast), (plain_tokens, plain) = runs
    saved = plain.target_passes - fast.target_passes
    same = tokens == plain_tokens
    verdict = "are identical"
    if not same:
        pairs = enumerate(zip(tokens, plain_tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(fast.tokens, plain.tokens))
        verdict = f"DIFFER from token {at} on"
    print(
        f"{_name(fast)} and plain {verdict}: {fast.tokens} tokens,"
        f" {saved} of {plain.target_passes} target passes saved"
        f" ({saved / plain.target_passes:.0%})"
    )
    return same


def _write(path: str, text: str):
    with replacing(Path(path)) as part:
        part.write_text(text)
