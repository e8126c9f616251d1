"""The mode that ds4's flags and environment switches ask for.

`resolve` finds it: `PRECEDENCE` is ds4's table (SPECULATION §1.4), of which the first
row that applies decides.  ds4's rows 7, 10 and 11 are left out: they are events inside
a cycle.  Without an anchor (policy `parity`) a continuous cycle commits one token;
`commit` cuts to the budget and the room, so a pass always has its rows; no verifier
fails halfway.

A switch of the environment is on when it is set, even to `0` or to nothing, as in ds4.

Depth.  ds4's N (`--mtp_draft`) counts drafts per cycle.  The first of them guesses what
the cycle's own base pass decides, so it is known for free, and the verification is of
N - 1 uncertain ones.  A chained cycle here leaves that first one out: its depth is
N - 1, and it commits the same N + 1 tokens in 2 passes when all are right.  At N = 1
nothing is left, which is plain decoding in ds4, too.  A wrong first guess ends a cycle
of ds4 after one token; here there is none.

Verifier.  `exact` is the default of `Mode`, for it costs nothing here.  `resolve` gives
`batched` wherever ds4 verifies in a batch, the continuous cycle included, to be of
ds4's output class: only strict (`--quality` or `DS4_MTP_STRICT`) asks for the exact
one, and in ds4 strict decodes in the chained cycle even under `DS4_MTP_CONTINUOUS`.

Corrections.  What this does otherwise than ds4, on purpose:

* Strict is exact at every depth and at the tail of a budget; in ds4 only in a cycle of
  exactly two drafts.  Only `DS4_MTP_BATCH_VERIFY` makes it batched; without strict
  that switch changes nothing.
* The margin gate belongs to N = 2, not to every cycle that a budget leaves two drafts.
* Nothing is drafted where it cannot be used: in plain decoding, when sampling, and
  under `DS4_MTP_SPEC_DISABLE`, which here holds for every caller.
* N is cut to 1 + MAX_DEPTH rather than to 16, for the rows of a decode pass; a note
  says so.
* `DS4_MTP_EXACT_REPLAY`, which has ds4 decode again what a batch accepted, for the
  state of one-token passes, changes nothing: the exact verifier leaves that state.
* `DS4_MTP_MIN_MARGIN` is cut to MAX_MARGIN, as the flag is.
* Speculation works on every device; ds4 decodes plainly on the CPU.
* Sampling without `--mtp` is row 2, not row 1: its tokens are not of class G.

Accepted without effect, since they choose only how ds4 is implemented:

* `DS4_MTP_CAPTURE_PREFIX1`, `DS4_MTP_FORCE_SNAPSHOT`: how the state before a rejected
  draft is kept.  Here taking back is a subtraction.
* `DS4_MTP_FULL_LOGITS`: where the argmax of the head is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Set

from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.modes import (
    MAX_MARGIN,
    Kind,
    Mode,
    OutputClass,
    Verifier,
    expect_margin,
)
from ds4jax.errors import expect


@dataclasses.dataclass(frozen=True)
class Logs:
    """Which of ds4's logs are asked for; none of them changes the mode.

    Attributes:
      spec: `DS4_MTP_SPEC_LOG`: drafts that were missed.
      timing: `DS4_MTP_TIMING`: milliseconds of each cycle's parts.
      confidence: `DS4_MTP_CONF_LOG`: each draft's lead over the head's runner-up.
      probe: `DS4_MTP_PROBE`: how often a draft in plain decoding would be right.
    """

    spec: bool = False
    timing: bool = False
    confidence: bool = False
    probe: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ds4Flags:
    """The flags of ds4 that choose a mode.

    Attributes:
      mtp: whether there is an MTP head (ds4: `--mtp FILE`).
      mtp_draft: N, drafts per cycle; less than 1 counts as 1.
      mtp_margin: threshold of the margin gate, in logits; 0 disables it.
      quality: strict.
      temperature: of sampling; greedy unless above 0.  ds4's default is 1.

    Raises:
      ConfigError: if the margin is not in 0..MAX_MARGIN or the temperature not finite.
    """

    mtp: bool = False
    mtp_draft: int = 1
    mtp_margin: float = 3.0
    quality: bool = False
    temperature: float = 0.0

    def __post_init__(self):
        expect_margin("mtp_margin", self.mtp_margin)
        expect(
            "temperature", math.isfinite(self.temperature), "a finite number",
            self.temperature,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the precedence table.

    Attributes:
      number: ds4's, of SPECULATION §1.4.
      condition: when it applies, in words.
      applies: the same, of the flags and the names that are set in the environment.
      kind, verifier: of the mode.
      gated: whether the mode takes the margin.
      output_class: see OutputClass.
      ds4: what ds4 does otherwise, in words; empty where nothing.
    """

    number: str
    condition: str
    applies: Callable[[Ds4Flags, Set[str]], bool] = dataclasses.field(repr=False)
    kind: Kind
    verifier: Verifier
    gated: bool = False
    output_class: OutputClass
    ds4: str = ""

    @property
    def words(self) -> str:
        """Return the mode in words; N is `--mtp_draft`."""
        if self.kind == "plain":
            return "plain"
        depth = "1" if self.kind == "continuous" else "N - 1"
        gate = ", margin gate" if self.gated else ""
        return f"{self.kind}, depth {depth}, {self.verifier}{gate}"


def _strict(flags: Ds4Flags, on: Set[str]) -> bool:
    return flags.quality or "DS4_MTP_STRICT" in on


PRECEDENCE = (
    Row(
        number="1", condition="no `--mtp`, temperature at most 0",
        applies=lambda flags, on: not flags.mtp and flags.temperature <= 0,
        kind="plain", verifier="exact", output_class="G",
        ds4="at any temperature; also on the CPU and in distributed sessions",
    ),
    Row(
        number="2", condition="temperature above 0",
        applies=lambda flags, on: flags.temperature > 0,
        kind="plain", verifier="exact", output_class="sampled",
        ds4="drafts in vain where N is above 1",
    ),
    Row(
        number="3", condition="N at most 1",
        applies=lambda flags, on: flags.mtp_draft <= 1,
        kind="plain", verifier="exact", output_class="G",
    ),
    Row(
        number="4", condition="`DS4_MTP_SPEC_DISABLE`",
        applies=lambda flags, on: "DS4_MTP_SPEC_DISABLE" in on,
        kind="plain", verifier="exact", output_class="G",
        ds4="drafts in vain",
    ),
    Row(
        number="5a",
        condition="`--quality` or `DS4_MTP_STRICT`, with `DS4_MTP_BATCH_VERIFY`",
        applies=lambda flags, on: _strict(flags, on) and "DS4_MTP_BATCH_VERIFY" in on,
        kind="chained", verifier="batched", output_class="near-greedy",
    ),
    Row(
        number="5", condition="`--quality` or `DS4_MTP_STRICT`",
        applies=_strict,
        kind="chained", verifier="exact", output_class="G",
        ds4="as 5a, except in a cycle of exactly two drafts",
    ),
    Row(
        number="6", condition="`DS4_MTP_CONTINUOUS`",
        applies=lambda flags, on: "DS4_MTP_CONTINUOUS" in on,
        kind="continuous", verifier="batched", output_class="M'",
        ds4="a cold cycle without an anchor or room for two rows (7)",
    ),
    Row(
        number="8", condition="N = 2",
        applies=lambda flags, on: flags.mtp_draft == 2,
        kind="chained", verifier="batched", gated=True, output_class="M",
    ),
    Row(
        number="9", condition="N above 2",
        applies=lambda flags, on: flags.mtp_draft > 2,
        kind="chained", verifier="batched", output_class="near-greedy",
        ds4="the margin gate in a cycle of exactly two drafts",
    ),
)  # fmt: skip
"""The rows, of which the first that applies decides; one always does."""


def table() -> str:
    """Return PRECEDENCE as a Markdown table; each row ends with where ds4 differs."""
    rows = [
        (row.number, row.condition, row.words, row.output_class, row.ds4)
        for row in PRECEDENCE
    ]
    head = [("row", "condition", "mode", "class", "ds4 instead"), ("---",) * 5]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in head + rows)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What flags and environment come to.

    Attributes:
      mode: how to decode.  Sampling is not a mode: where `output_class` is `sampled`
        the caller has to sample from plain decoding's logits, or to refuse.
      row: of PRECEDENCE, the one that decided.
      logs: what is asked for.
      notes: one line for each value that was not taken as given, or that ds4 would
        have taken otherwise.
    """

    mode: Mode
    row: Row
    logs: Logs
    notes: tuple[str, ...]

    @property
    def output_class(self) -> OutputClass:
        """Return the class of the tokens that the mode commits."""
        return self.row.output_class


def resolve(flags: Ds4Flags, environment: Mapping[str, str]) -> Resolution:
    """Return the mode that ds4's flags and environment switches ask for.

    Args:
      flags: ds4's, by value.
      environment: variables by name, such as `os.environ`.
    """
    row = next(row for row in PRECEDENCE if row.applies(flags, environment.keys()))
    notes = []
    depth = {"plain": 0, "continuous": 1, "chained": flags.mtp_draft - 1}[row.kind]
    if depth > MAX_DEPTH:
        depth = MAX_DEPTH
        notes.append(
            f"mtp_draft: cut from {flags.mtp_draft} to {1 + depth}, the most here"
        )
    if row.verifier == "exact" and depth > 1:
        notes.append("strict: exact at every depth; ds4 is so at two drafts only")
    margin = 0.0
    if row.gated:
        margin, ignored = _margin(flags, environment)
        notes += ignored
    logs = Logs(
        spec="DS4_MTP_SPEC_LOG" in environment,
        timing="DS4_MTP_TIMING" in environment,
        confidence="DS4_MTP_CONF_LOG" in environment,
        probe="DS4_MTP_PROBE" in environment,
    )
    mode = Mode(row.kind, depth, row.verifier, margin)
    return Resolution(mode, row, logs, tuple(notes))


def _margin(flags: Ds4Flags, environment: Mapping[str, str]) -> tuple[float, list[str]]:
    """Return the gate's threshold, and what there is to note about it."""
    name = "DS4_MTP_MIN_MARGIN"
    text = environment.get(name)
    if text is None:
        return flags.mtp_margin, []
    try:
        margin = float(text)
    except ValueError:
        margin = math.nan
    if not margin >= 0:
        return flags.mtp_margin, [
            f"{name}: expected a number of at least 0, found {text!r}; "
            f"mtp_margin={flags.mtp_margin} holds"
        ]
    if margin > MAX_MARGIN:
        return float(MAX_MARGIN), [f"{name}: cut from {text!r} to {MAX_MARGIN}"]
    return margin, []
