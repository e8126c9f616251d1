"""What the commands that decode share: the flags that choose a mode.

There are two vocabularies: ours, which says the mode, and ds4's, whose flags and
environment switches `precedence.resolve` turns into one.  Only a flag brings ds4's into
play; the environment alone does nothing.

A command gets the flags with `flags.adopt_module_key_flags(decoding_flags)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import cast, get_args

from absl import flags

from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.gate import Gate
from ds4jax.decode.modes import (
    MAX_MARGIN,
    PREFILL_CHUNK,
    AnchorPolicy,
    Decoding,
    Kind,
    Mode,
    OutputClass,
    Verifier,
)
from ds4jax.decode.precedence import Ds4Flags, Logs, resolve
from ds4jax.errors import ConfigError
from ds4jax.model.mtp import Pairing

_MODE = flags.DEFINE_enum(
    "mode", "continuous", get_args(Kind), "How to decode; the tokens are the same."
)
_DEPTH = flags.DEFINE_integer(
    "depth", None, f"Drafts per cycle: 1 by default, at most {MAX_DEPTH}; 0 if plain."
)
_VERIFIER = flags.DEFINE_enum(
    "verifier", "exact", get_args(Verifier),
    "exact keeps plain decoding's bits; batched may leave them at a near tie.",
)  # fmt: skip
_MARGIN = flags.DEFINE_float(
    "margin", 0.0,
    "Verify only drafts that lead by as much, in logits; of chained, batched, depth 1.",
)  # fmt: skip
_POLICY = flags.DEFINE_enum(
    "policy", "warm", get_args(AnchorPolicy),
    "When drafting can start: warm, at once; parity, as in ds4 after a cold cycle.",
)  # fmt: skip
_FILL = flags.DEFINE_bool(
    "fill", True, "Give the MTP head a row for every token; ds4 leaves gaps."
)
_PAIRING = flags.DEFINE_enum(
    "pairing", "trained", get_args(Pairing),
    "Of the MTP head: the streams of p with the token after it, or as in ds4 with it.",
)  # fmt: skip
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Of sampling; 0 is greedy.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", PREFILL_CHUNK,
    "Rows of a prefill pass, and most of any pass; on a GPU 4096 suits Flash.",
    lower_bound=1,
)  # fmt: skip
_GATE = flags.DEFINE_bool(
    "gate", False, "Decode plainly for a while where drafts are not accepted."
)
_GATE_LEAST = flags.DEFINE_float(
    "gate_least", Gate.least,
    "Drafts accepted per cycle below which --gate stops drafting; `ds4jax ablate` says"
    " from how many on they pay.",
    lower_bound=0,
)  # fmt: skip
_MTP_DRAFT = flags.DEFINE_integer(
    "mtp_draft", None, "ds4's: N drafts per cycle, of which it knows the first."
)
_MTP_MARGIN = flags.DEFINE_float(
    "mtp_margin", Ds4Flags.mtp_margin, "ds4's: margin gate of N = 2, in logits.",
    lower_bound=0, upper_bound=MAX_MARGIN,
)  # fmt: skip
_QUALITY = flags.DEFINE_bool("quality", False, "ds4's: verify exactly.")

_OURS = (_MODE, _DEPTH, _VERIFIER, _MARGIN)
_DS4S = (_MTP_DRAFT, _MTP_MARGIN, _QUALITY)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the flags come to.

    Attributes:
      decoding: how to decode.
      output_class: what the tokens are, see `modes.OutputClass`.
      logs: what to log of each cycle.
      notes: lines to show, about flags that were not taken as given.
    """

    decoding: Decoding
    output_class: OutputClass
    logs: Logs = Logs()
    notes: Sequence[str] = ()


def seed() -> int:
    """Return the seed of sampling."""
    return _SEED.value


def mode_flags() -> list[str]:
    """Return the flags of the command line that choose kind and depth of the mode."""
    return _given([_MODE, _DEPTH, _MARGIN, *_DS4S])


def choose(mtp: bool) -> Choice:
    """Return the way of decoding that the flags ask for.

    Args:
      mtp: whether there is a head to draft with.

    Raises:
      ConfigError: for flags that exclude each other, or a mode that cannot be.
    """
    ours, ds4s = _given(_OURS), _given(_DS4S)
    if ours and ds4s:
        raise ConfigError(
            f"--{ours[0]} and --{ds4s[0]}: expected our flags or ds4's to choose the"
            " mode; leave one out"
        )
    if _GATE_LEAST.present and not _GATE.value:
        raise ConfigError("--gate_least: expected --gate with it, found none")
    if ds4s:
        with _named():
            asked = Ds4Flags(
                mtp=mtp,
                mtp_draft=1 if _MTP_DRAFT.value is None else _MTP_DRAFT.value,
                mtp_margin=_MTP_MARGIN.value,
                quality=_QUALITY.value,
                temperature=_TEMPERATURE.value,
            )
        found = resolve(asked, os.environ)
        row = f"ds4's row {found.row.number} ({found.row.condition}): {found.row.words}"
        return Choice(
            _decoding(found.mode), found.output_class, found.logs, (row, *found.notes)
        )
    kind, verifier = cast(Kind, _MODE.value), cast(Verifier, _VERIFIER.value)
    depth = _DEPTH.value
    if depth is None:
        depth = int(kind != "plain")
    with _named():
        mode = Mode(kind, depth, verifier, _MARGIN.value)
    if depth and not mtp:
        raise ConfigError(f"--mode={kind}: needs an MTP file to draft with; see --mtp")
    if _GATE.value and not depth:
        raise ConfigError("--gate: expected a mode that drafts, found plain")
    near = "near-greedy" if mode.verifier == "batched" else "G"
    return Choice(_decoding(mode), "sampled" if _TEMPERATURE.value else near)


def _given(some: Sequence[flags.FlagHolder]) -> list[str]:
    return [flag.name for flag in some if flag.present]


def _decoding(mode: Mode) -> Decoding:
    with _named():
        return Decoding(
            mode=mode,
            policy=cast(AnchorPolicy, _POLICY.value),
            fill=_FILL.value,
            pairing=cast(Pairing, _PAIRING.value),
            temperature=_TEMPERATURE.value,
            gate=Gate(least=_GATE_LEAST.value) if _GATE.value else None,
            prefill_chunk=_PREFILL_CHUNK.value,
        )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Give the settings in a message the names of their flags."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
