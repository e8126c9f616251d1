"""The flags of a replay: which modes are timed, with how many right drafts.

A command gets the flags with `flags.adopt_module_key_flags(replay_flags)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast, get_args

from absl import flags

from ds4jax.decode.modes import GREEDY, Kind, Mode
from ds4jax.errors import ConfigError
from ds4jax.experiments import decoding_flags
from ds4jax.experiments.context_sweep import Way
from ds4jax.experiments.decoding_flags import Choice

_REPLAY = flags.DEFINE_list(
    "replay", None,
    "Decode plainly, then replay that text as drafts: right in these shares, which of"
    " them by --seed.",
)  # fmt: skip
_MODES = flags.DEFINE_list(
    "replay_modes", None,
    "Modes to replay in, KIND or KIND:DEPTH; by default the one of --mode and --depth.",
)  # fmt: skip


def ways(choice: Choice) -> list[Way]:
    """Return plain decoding and then each mode at each rate; without --replay the
    chosen way alone.

    Raises:
      ConfigError: for rates or modes that cannot be.
    """
    if _REPLAY.value is None:
        if _MODES.value is not None:
            raise ConfigError("--replay_modes: expected --replay with it")
        return [Way(choice.decoding)]
    if choice.decoding.gate is not None:
        raise ConfigError("--gate: expected no --replay with it")
    rates = [_rate(word) for word in _REPLAY.value]
    if not rates:
        raise ConfigError("--replay: expected one rate or more, found none")
    plain = dataclasses.replace(choice.decoding, mode=GREEDY.mode)
    drafting = [
        dataclasses.replace(choice.decoding, mode=mode) for mode in _modes(choice)
    ]
    for how in drafting:
        if not how.depth:
            raise ConfigError(
                "--replay: expected a mode that drafts, found"
                f" --mode={how.mode.kind}, --prefill_chunk={how.prefill_chunk}"
            )
    return [Way(plain), *(Way(how, rate) for how in drafting for rate in rates)]


def _rate(word: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ConfigError(f"--replay: expected rates in 0..1, found {word}")
    return rate


def _modes(choice: Choice) -> Sequence[Mode]:
    if _MODES.value is None:
        return [choice.decoding.mode]
    if given := decoding_flags.mode_flags():
        raise ConfigError(
            f"--replay_modes and --{given[0]}: expected one of them to choose the modes"
        )
    return [_mode(word, choice.decoding.mode) for word in _MODES.value]


def _mode(word: str, usual: Mode) -> Mode:
    kind, colon, depth = word.partition(":")
    drafting = [kind for kind in get_args(Kind) if kind != "plain"]
    if kind not in drafting or (colon and not depth.isdecimal()):
        raise ConfigError(
            f"--replay_modes: expected {' or '.join(drafting)}, with a :DEPTH or"
            f" without, found {word}"
        )
    try:
        return Mode(cast(Kind, kind), int(depth or 1), usual.verifier)
    except ConfigError as error:
        raise ConfigError(f"--replay_modes={word}: {error}") from None
