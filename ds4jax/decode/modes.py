"""Ways of decoding: a mode, and everything else that is static about a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.gate import Gate
from ds4jax.errors import expect
from ds4jax.model.mtp import Pairing

Kind = Literal["plain", "chained", "continuous"]
Verifier = Literal["exact", "batched"]
OutputClass = Literal["G", "M", "M'", "near-greedy", "sampled"]
"""What the tokens are, as far as it is promised: G, plain decoding's, bit for bit; M,
M' and near-greedy, those of a batched verifier, which may leave G at a near tie (in
ds4 M is the two-draft cycle's output and M' the continuous one's); or sampled."""

PREFILL_CHUNK = 256
"""Rows of a prefill pass by default: for models as small as the one that ships.  Flash
on a GPU wants 4,096, of which each of its experts gets about 96."""

MIN_TEMPERATURE = 1e-6

MAX_MARGIN = 1000
"""The most that ds4's `--mtp-margin` takes, in logits."""


def expect_margin(name: str, found: Any):
    """Raise a ConfigError unless the setting `name` is a margin."""
    holds = type(found) in (int, float) and 0 <= found <= MAX_MARGIN
    expect(name, holds, f"a number in 0..{MAX_MARGIN}", found)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way of decoding; a static jit argument of the cycles.

    Attributes:
      kind: `plain`, a pass on each decided token; `chained`, such a pass and then one
        that verifies drafts; `continuous`, both in one pass (DESIGN §4).
      depth: drafts a cycle verifies: 0 when plain, else 1..MAX_DEPTH.
      verifier: `exact`, which keeps the row contract, or `batched`, which need not.
      margin: gate, in logits: a draft that leads the head's runner-up by less is not
        verified.  0 is no gate.  As in ds4 only a batched chained cycle of one
        uncertain draft has it (SPECULATION §1.5).

    Raises:
      ConfigError: for any other value, or a combination that means nothing.
    """

    kind: Kind
    depth: int
    verifier: Verifier = "exact"
    margin: float = 0.0

    def __post_init__(self):
        plain = self.kind == "plain"
        gate = (self.kind, self.verifier, self.depth) == ("chained", "batched", 1)
        expect(
            "kind",
            self.kind in get_args(Kind),
            "plain, chained or continuous",
            self.kind,
        )
        expect(
            "depth",
            type(self.depth) is int
            and (self.depth == 0 if plain else 1 <= self.depth <= MAX_DEPTH),
            "0 when plain" if plain else f"1..{MAX_DEPTH} when {self.kind}",
            self.depth,
        )
        expect(
            "verifier",
            self.verifier == "exact" or (self.verifier == "batched" and not plain),
            "exact when plain" if plain else "exact or batched",
            self.verifier,
        )
        expect_margin("margin", self.margin)
        expect(
            "margin", gate or self.margin == 0,
            "0 unless chained, batched and of depth 1", self.margin,
        )  # fmt: skip


AnchorPolicy = Literal["warm", "parity"]
"""When the anchor is valid: `warm`, after whatever left its streams behind; `parity`,
as in antirez/ds4#371 only after a verification, so that sync, rewind, invalidate,
restore and plain evaluation are each followed by a cold cycle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Everything static about how a carry moves; a static jit argument.

    Attributes:
      mode: of the cycles.
      policy: when the anchor is valid.
      fill: write the MTP head's row of every token.  Otherwise, as in ds4, only of
        those that a draft starts from, which leaves gaps; for ablation.
      pairing: which token the head gets with the streams of position p: `trained`, the
        one after; `ds4`, the one at p, as ds4 first does, for ablation.
      temperature: 0 is greedy; else at least MIN_TEMPERATURE, below which logits
        would overflow; see `transitions.choose`.
      gate: when to decode plainly for a while, drafts not being accepted; None: never.
      prefill_chunk: rows of a prefill pass; the last one is filled up and marked with
        its count.  No verification is of more rows either (antirez/ds4#381).

    Raises:
      ConfigError: for another temperature, policy or pairing, or a chunk without rows.
    """

    mode: Mode
    policy: AnchorPolicy = "warm"
    fill: bool = True
    pairing: Pairing = "trained"
    temperature: float = 0.0
    gate: Gate | None = None
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def depth(self) -> int:
        """Return the drafts that a cycle verifies: the mode's, as far as rows allow."""
        return min(self.mode.depth, self.prefill_chunk - 1)

    def __post_init__(self):
        expect(
            "prefill_chunk", self.prefill_chunk >= 1, "at least 1", self.prefill_chunk
        )
        expect(
            "policy",
            self.policy in get_args(AnchorPolicy),
            "warm or parity",
            self.policy,
        )
        expect(
            "pairing",
            self.pairing in get_args(Pairing),
            "trained or ds4",
            self.pairing,
        )
        expect(
            "temperature",
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
            f"0, or a finite number from {MIN_TEMPERATURE}", self.temperature,
        )  # fmt: skip


GREEDY = Decoding(mode=Mode("plain", 0))
"""Plain greedy decoding."""
CONTINUOUS = Decoding(mode=Mode("continuous", 1))
"""The default: continuous at depth 1, verified exactly."""
