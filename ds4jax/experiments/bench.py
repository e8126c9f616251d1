"""Measure the speed of reading and of decoding against the context, as ds4-bench does.

A text is read up to one context after another; at each of them the interval since the
last is timed, --gen_tokens tokens are decoded from there and timed, and what they
changed is undone.  No token ends decoding (ds4-bench never decodes the one that would).
Compilation is not timed.  Each context is a row: printed as it is measured, and with
--csv written at once, so that a sweep which is stopped leaves whole rows.  The columns
from ctx_tokens to kvcache_bytes (of live rows) are ds4-bench's.  The last pass over an
interval is filled up, so whole --prefill_chunk are read fastest; and a pass looks at
all that --ctx_alloc has room for.

The text is a manual that ships, repeated as needed, or --prompt_file, which must be
long enough.  For a model without a vocabulary ids are drawn at random, always the same.
--synth makes a model of random weights on the device, kept packed as in its file; its
head's drafts are never right.  What speculation would gain is measured by --replay: at
each context plain decoding comes first, and then the tokens that it committed are the
drafts, right as often as is asked and else the head's own.  A row says what was
accepted and gained, r and d measured there, and what they predict.  Its passes of the
head count, and what is committed does not change.

With --noprefill, only for --synth, contexts are not read: states have random contents,
and room for their own context alone unless --ctx_alloc says how much for all.

Example:
    ds4jax bench --ctx_start=256 --ctx_max=2048 --step_incr=256 --csv=sweep.csv
    ds4jax bench --synth=flash --plan=ds4-q2 --layers=4 --mode=plain --figure=sweep.png
    ds4jax bench --synth=flash --plan=ds4-q2 --dtype=bfloat16 --noprefill \
        --ctx_start=2048 --step_mul=4 --replay=0,0.5,0.7,1 --csv=replay.csv
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import assets, gguf
from ds4jax.config import ModelConfig
from ds4jax.decode import driver
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.modes import Decoding
from ds4jax.decode.precedence import Logs
from ds4jax.errors import ConfigError, FileError, TokenError
from ds4jax.experiments import (
    decoding_flags,
    environment,
    model_flags,
    replay_columns,
    replay_flags,
    synth_flags,
    token_flags,
)
from ds4jax.experiments.context_sweep import Point, Way, frontiers, sweep
from ds4jax.experiments.decoding_flags import Choice
from ds4jax.files import check_place, replacing, write_table
from ds4jax.model import deepseek

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(synth_flags)
flags.adopt_module_key_flags(decoding_flags)
flags.adopt_module_key_flags(replay_flags)
_SYNTH = flags.DEFINE_enum(
    "synth", None, list(synth_flags.SHAPES),
    "Random weights of this shape, cut and stored as --layers and --plan say.",
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Operands of the matrix products."
)
_PREFILL = flags.DEFINE_bool("prefill", True, "Read each context, and time it.")
_CTX_START = flags.DEFINE_integer("ctx_start", 2048, "First context.", lower_bound=1)
_CTX_MAX = flags.DEFINE_integer("ctx_max", 32768, "Last context.", lower_bound=1)
_CTX_ALLOC = flags.DEFINE_integer(
    "ctx_alloc", None, "Tokens to have room for; by default all that is needed."
)
_STEP_INCR = flags.DEFINE_integer(
    "step_incr", 2048, "From one context to the next, if --step_mul is 1.",
    lower_bound=1,
)  # fmt: skip
_STEP_MUL = flags.DEFINE_float(
    "step_mul", 1.0, "Factor from one context to the next.", lower_bound=1
)
_GEN_TOKENS = flags.DEFINE_integer(
    "gen_tokens", 128, "Tokens to decode at each context.", lower_bound=1
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Text to read.")
_CSV = flags.DEFINE_string("csv", None, "CSV file to write.")
_FIGURE = flags.DEFINE_string("figure", None, "PNG file to draw both speeds into.")

_PRINTED = {
    "ctx_tokens": 10, "prefill_tokens": 14, "prefill_tps": 11, "gen_tokens": 10,
    "gen_tps": 9, "kvcache_bytes": 13, "acceptance": 10, "shared_reads_per_token": 22,
}  # fmt: skip
"""The columns of the table that is shown, with their widths."""
_PRINTED_OF_REPLAY = {
    "ctx_tokens": 10, "prefill_tps": 11, "mode": 10, "depth": 5, "replay": 6,
    "gen_tps": 9, "acceptance": 10, "shared_reads_per_token": 22, "speedup": 7,
    "predicted_speedup": 17, "plains_tokens": 13,
}  # fmt: skip


def main(argv: Sequence[str]):
    """Measure what the flags ask for.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or the text does not fit in memory.
    """
    del argv
    for path in filter(None, (_CSV.value, _FIGURE.value)):
        check_place(Path(path))
    choice = _choose()
    ways = replay_flags.ways(choice)
    draw = _drawing(ways) if _FIGURE.value else None
    config = _config()
    alloc = _check_contexts(config)
    prompt = _read_prompt(config.vocab)
    stops = frontiers(
        _CTX_START.value, _CTX_MAX.value, _STEP_INCR.value, _STEP_MUL.value
    )
    for note in choice.notes:
        print(note, file=sys.stderr)
    where, name = environment.describe(), _model_name()
    is_replay = len(ways) > 1
    printed = _PRINTED_OF_REPLAY if is_replay else _PRINTED
    print(f"[{_title(ways)}] {name} on {where['device']}")
    print(_line({column: column for column in printed}, printed), flush=True)
    rows: list[dict[str, str]] = []
    with (
        model_flags.within_memory(),
        tqdm(total=len(stops) * len(ways), unit="run", disable=None) as bar,
    ):
        model = _load(config, ways)
        plain = None
        for point in _points(model, prompt, stops, ways, alloc):
            row = _measured(point) | {"model": name} | _described(point, choice)
            row |= _counted(point)
            if is_replay:
                plain = plain if point.way.rate is not None else point
                row |= replay_columns.columns(point, plain or point, model)
            rows.append(row | where)
            bar.clear()
            print(_line(rows[-1], printed), flush=True)
            bar.update()
            if _CSV.value:
                write_table(Path(_CSV.value), rows)
    if draw and _FIGURE.value:
        with replacing(Path(_FIGURE.value)) as part:
            draw(rows, part)


def _drawing(
    ways: Sequence[Way],
) -> Callable[[Sequence[Mapping[str, str]], Path], None]:
    """Return what draws the figure."""
    try:
        from ds4jax.experiments import replay_figure, sweep_figure
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise ConfigError(
            "--figure: needs matplotlib: pip install 'ds4jax[plot]'"
        ) from None
    return sweep_figure.draw if len(ways) == 1 else replay_figure.draw


def _choose() -> Choice:
    has_head = _SYNTH.value is not None or model_flags.mtp_path() is not None
    choice = decoding_flags.choose(mtp=has_head)
    if choice.logs != Logs():
        raise ConfigError(
            "--mtp_draft: expected no log of cycles, which takes time; unset"
            " DS4_MTP_..._LOG, DS4_MTP_TIMING and DS4_MTP_PROBE"
        )
    return choice


def _config() -> ModelConfig:
    """Return the architecture, before any weight is read or made."""
    if _SYNTH.value is None:
        if layout := synth_flags.given():
            raise ConfigError(f"--{layout[0]}: expected --synth with it")
        if not _PREFILL.value:
            raise ConfigError("--noprefill: expected --synth with it")
        return gguf.config(gguf.read(model_flags.trunk_path()))
    if model_flags.are_given():
        raise ConfigError("--synth: expected no file with it; leave out --gguf, --mtp")
    if _PROMPT_FILE.value is not None:
        raise ConfigError(
            "--prompt_file: expected a model with a vocabulary, found --synth"
        )
    config = synth_flags.config(_SYNTH.value)
    return dataclasses.replace(config, dtype=_DTYPE.value)


def _check_contexts(config: ModelConfig) -> int | None:
    """Return the room that every state is to have, in tokens; None for its own."""
    start, most, alloc = _CTX_START.value, _CTX_MAX.value, _CTX_ALLOC.value
    if start > most:
        raise ConfigError(
            f"--ctx_start={start}: expected at most --ctx_max, which is {most}"
        )
    if not math.isfinite(_STEP_MUL.value):
        raise ConfigError(f"--step_mul={_STEP_MUL.value}: expected a finite number")
    needed = most + _GEN_TOKENS.value + 1
    if alloc is not None and alloc < needed:
        raise ConfigError(
            f"--ctx_alloc={alloc}: expected at least {needed}, one more than --ctx_max"
            " and --gen_tokens together"
        )
    name, size = ("ctx_max", needed) if alloc is None else ("ctx_alloc", alloc)
    limit = int(config.yarn_original_context * config.yarn_factor)
    if size > limit:
        raise ConfigError(
            f"--{name}: expected a context of at most {limit} tokens, the model's,"
            f" found {size}"
        )
    return size if _PREFILL.value else alloc


def _read_prompt(vocab: int) -> list[int]:
    """Return as many ids as the last context has; none if they are not to be read."""
    if not _PREFILL.value:
        return []
    most = _CTX_MAX.value
    tokenizer = None if _SYNTH.value else model_flags.load_tokenizer()
    path = _PROMPT_FILE.value
    if tokenizer is None:
        if path is not None:
            raise FileError(
                f"{model_flags.trunk_path()}: has no vocabulary to read --prompt_file"
                " with; leave that out"
            )
        return np.random.default_rng(0).integers(vocab, size=most).tolist()
    text = token_flags.read_text(path or str(assets.prompt("technical")))
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    if path is None:
        ids += ids[1:] * (most // (len(ids) - 1))
    if len(ids) < most:
        raise TokenError(
            f"--prompt_file={path}: expected at least {most} tokens, as --ctx_max says,"
            f" found {len(ids)}"
        )
    return ids[:most]


def _load(config: ModelConfig, ways: Sequence[Way]) -> deepseek.Model:
    if _SYNTH.value is None:
        return model_flags.load(dtype=_DTYPE.value)
    drafts = any(way.decoding.depth for way in ways)
    return deepseek.synthetic_model(config, synth_flags.plan(), mtp=drafts)


def _points(
    model: deepseek.Model, prompt: Sequence[int], stops: Sequence[int],
    ways: Sequence[Way], alloc: int | None,
) -> Iterator[Point]:  # fmt: skip
    tokens, seed = _GEN_TOKENS.value, decoding_flags.seed()
    if _PREFILL.value:
        assert alloc is not None
        return sweep(model, prompt, stops, tokens, ways, alloc, seed)
    return itertools.chain.from_iterable(
        sweep(model, [], [at], tokens, ways, alloc or at + tokens + 1, seed, read=False)
        for at in stops
    )


def _model_name() -> str:
    if _SYNTH.value is None:
        return model_flags.trunk_path().name
    layers = synth_flags.config(_SYNTH.value).layers
    return f"synthetic {_SYNTH.value} {synth_flags.plan()} {layers} layers"


def _described(point: Point, choice: Choice) -> dict[str, str]:
    """Return the columns that say how it was decoded, and from what."""
    how = point.way.decoding
    mode, usual = how.mode, Decoding(mode=how.mode)
    settings = [
        f"{field.name}={value}"
        for field in dataclasses.fields(usual)
        if (value := getattr(how, field.name)) != getattr(usual, field.name)
    ]
    settings += [f"margin={mode.margin}"] * bool(mode.margin)
    settings += [f"dtype={_DTYPE.value}"] * (_DTYPE.value != "float32")
    greedy = "sampled" if how.temperature else "G"
    return {
        "mode": mode.kind,
        "depth": str(how.depth),
        "verifier": mode.verifier,
        "output_class": choice.output_class if how.depth else greedy,
        "settings": " ".join(settings),
        "state": "read" if _PREFILL.value else "random",
    }


def _title(ways: Sequence[Way]) -> str:
    names = list(dict.fromkeys(_name(way.decoding) for way in ways))
    rates = dict.fromkeys(f"{way.rate:g}" for way in ways if way.rate is not None)
    if not rates:
        return names[0]
    return f"{', '.join(names)}; replay at {', '.join(rates)}"


def _name(how: Decoding) -> str:
    near = ", batched" if how.mode.verifier == "batched" else ""
    return f"{how.mode.kind} {how.depth}{near}" if how.mode.depth else how.mode.kind


def _measured(point: Point) -> dict[str, str]:
    """Return the columns of ds4-bench."""
    return {
        "ctx_tokens": str(point.context),
        "prefill_tokens": str(point.read),
        "prefill_tps": (
            f"{point.read / point.prefill_seconds:.2f}" if point.read else ""
        ),
        "gen_tokens": str(len(point.tokens)),
        "gen_tps": f"{len(point.tokens) / point.decode_seconds:.2f}",
        "kvcache_bytes": str(point.cache_bytes),
    }


def _counted(point: Point) -> dict[str, str]:
    """Return the columns of what was counted; a share of no drafts is empty."""
    share = lambda some, of: f"{some / of:.3f}" if of else ""  # noqa: E731
    return {
        "acceptance": share(sum(point.accepted), sum(point.drafted)),
        **{
            f"accepted_at_{place + 1}": share(point.accepted[place], of)
            for place, of in zip(range(MAX_DEPTH), point.drafted, strict=True)
        },
        "shared_reads_per_token": share(point.passes, len(point.tokens)),
        "passes": str(point.passes),
        "ctx_alloc": str(point.allocated),
        "sha256": driver.digest(point.tokens),
    }


def _line(row: Mapping[str, str], printed: Mapping[str, int]) -> str:
    return "  ".join(f"{row[name]:>{width}}" for name, width in printed.items())
