"""What an ablation varies: its settings, and the arms that follow from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds4jax import assets
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.gate import Gate
from ds4jax.decode.modes import Decoding, Mode
from ds4jax.errors import ConfigError, expect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """An ablation; a config file gives any of these fields.

    Attributes:
      modes: `continuous`, `chained` or both.
      depths: drafts per cycle, 0..MAX_DEPTH.  0 is plain decoding, which is measured
        whether it is named or not: everything is compared with it.
      verifiers: `exact`, `batched`.
      pairings: of the MTP head, `trained`, `ds4`.
      fills: whether the head's cache is filled.
      gates: whether the gate may stop drafting.
      gate_least: drafts accepted per cycle below which it does, see `gate.Gate`: one
        for each of `pairings`, since with ds4's a draft takes longer, or one for all.
      cross: measure every combination of the axes.  Otherwise the first value of each
        axis stands for it, at every mode and depth, and each further value is tried
        alone, at the first mode and the first depth that drafts.
      texts: shipped prompts that are continued.
      seeds: which part of a prompt is continued: 0, all of it; another, its beginning,
        cut at a place of the second half that the seed draws.  With a temperature a
        seed is that of the noise as well.
      temperature: of sampling; 0 is greedy.
      tokens: committed by a run.
      turn: most cycles of a run before those of the other arms have their turns, so
        that a machine which slows down meanwhile slows down all of them.  Each turn
        starts the compiled program anew, which is in its time.
      rounds: runs of each arm that count; one more, the first, is dropped.
      repeats: passes that a draft's and a verification's time is the mean of.

    Raises:
      ConfigError: for a value that means nothing.
    """

    modes: tuple[str, ...] = ("continuous", "chained")
    depths: tuple[int, ...] = (0, 1, 2, 3, 4)
    verifiers: tuple[str, ...] = ("exact",)
    pairings: tuple[str, ...] = ("trained",)
    fills: tuple[bool, ...] = (True,)
    gates: tuple[bool, ...] = (False,)
    gate_least: tuple[float, ...] = (Gate.least,)
    cross: bool = False
    texts: tuple[str, ...] = assets.PROMPTS
    seeds: tuple[int, ...] = (0,)
    temperature: float = 0.0
    tokens: int = 128
    turn: int = 128
    rounds: int = 5
    repeats: int = 10

    def __post_init__(self):
        known: dict[str, Sequence[Any]] = {
            "modes": ("continuous", "chained"),
            "depths": range(MAX_DEPTH + 1),
            "verifiers": ("exact", "batched"),
            "pairings": ("trained", "ds4"),
            "fills": (True, False),
            "gates": (False, True),
            "texts": assets.PROMPTS,
        }
        for name, values in known.items():
            found = getattr(self, name)
            allowed = " ".join(map(str, values))
            is_known = [any(x is y or (x == y and type(x) is type(y)) for y in values)
                        for x in found]  # fmt: skip
            expect(f"config.{name}", bool(found) and all(is_known),
                   f"some of: {allowed}", found)  # fmt: skip
            expect(f"config.{name}", len(set(found)) == len(found), "each once", found)
        seeds = self.seeds
        whole = [type(seed) is int and seed >= 0 for seed in seeds]
        expect("config.seeds", bool(whole) and all(whole), "some of 0, 1, ..", seeds)
        expect("config.seeds", len(set(seeds)) == len(seeds), "each once", seeds)
        expect("config.cross", type(self.cross) is bool, "True or False", self.cross)
        for name in ("tokens", "turn", "rounds", "repeats"):
            found = getattr(self, name)
            expect(f"config.{name}", type(found) is int and found >= 1, "at least 1",
                   found)  # fmt: skip
        leasts = self.gate_least
        for least in leasts:
            holds = type(least) in (int, float) and least >= 0
            expect("config.gate_least", holds, "at least 0", least)
        expect("config.gate_least", len(leasts) in (1, len(self.pairings)),
               "one, or one for each of pairings", leasts)  # fmt: skip
        try:
            Decoding(mode=Mode("plain", 0), temperature=self.temperature)
        except ConfigError as error:
            raise ConfigError(f"config.{error}") from None

    def least(self, pairing: str) -> float:
        """Return the `gate_least` of one of `pairings`."""
        one_for_all = len(self.gate_least) == 1
        return self.gate_least[0 if one_for_all else self.pairings.index(pairing)]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Return the settings of a config file; words may be joined by commas.

        Raises:
          ConfigError: for an unknown field, or as the constructor.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for name, value in config.items():
            expect(name, name in fields, f"a field of: {' '.join(fields)}", value)
            if type(fields[name].default) is tuple:
                value = tuple(_split(value))
            given[name] = value
        return cls(**given)

    def to_json(self) -> str:
        """Return the settings as one line, the same for the same settings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _split(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple | list) else (value,):
        yield from item.split(",") if isinstance(item, str) else (item,)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of decoding that an ablation measures.

    Attributes:
      mode: `plain`, `continuous` or `chained`.
      depth: drafts per cycle.
      verifier: `exact` or `batched`.  Plain decoding is measured in both: in the exact
        class, whose pass has the rows of every decode pass, and by passes of one row,
        the fastest there are, which may leave that class.
      pairing: of the head.
      fill: whether its cache is filled.
      gate: whether the gate may stop drafting.
    """

    mode: str
    depth: int
    verifier: str = "exact"
    pairing: str = "trained"
    fill: bool = True
    gate: bool = False

    @property
    def name(self) -> str:
        """Return words that tell the arm from all others."""
        if not self.depth:
            return "plain" if self.verifier == "exact" else "plain one-row"
        changed = {
            "batched": self.verifier == "batched",
            "ds4-pairing": self.pairing == "ds4",
            "unfilled": not self.fill,
            "gate": self.gate,
        }
        words = [word for word, holds in changed.items() if holds]
        return " ".join([self.mode, str(self.depth), *words])

    def decoding(self, settings: Settings) -> Decoding:
        """Return how it decodes; for plain decoding, in the exact class."""
        named: dict[str, Any] = dict(
            pairing=self.pairing, fill=self.fill, temperature=settings.temperature
        )
        if not self.depth:
            return Decoding(mode=Mode("plain", 0), **named)
        kind: Any = self.mode
        verifier: Any = self.verifier
        gate = Gate(least=settings.least(self.pairing)) if self.gate else None
        return Decoding(mode=Mode(kind, self.depth, verifier), gate=gate, **named)


PLAIN = Arm("plain", 0)
ONE_ROW = Arm("plain", 0, "batched")
REFERENCES = (PLAIN, ONE_ROW)
"""Plain decoding in both of its classes; the faster one is what others must beat."""


def arms(settings: Settings) -> tuple[Arm, ...]:
    """Return what an ablation measures: plain decoding, then all that drafts."""
    axes: list[Sequence[Any]] = [
        settings.verifiers,
        settings.pairings,
        settings.fills,
        settings.gates,
    ]
    first: tuple[Any, ...] = tuple(axis[0] for axis in axes)
    depths = [depth for depth in settings.depths if depth]
    grid = list(itertools.product(settings.modes, depths))
    if settings.cross:
        drafting = [Arm(*at, *rest) for at in grid for rest in itertools.product(*axes)]
    else:
        drafting = [Arm(*at, *first) for at in grid]
        alone = [
            (*first[:place], value, *first[place + 1 :])
            for place, axis in enumerate(axes)
            for value in axis[1:]
        ]
        drafting += [Arm(*grid[0], *rest) for rest in alone if grid]
    return (*REFERENCES, *drafting)
