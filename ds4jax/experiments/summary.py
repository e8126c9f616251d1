"""What the runs of an ablation come to, for each arm on each text."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from ds4jax.experiments.arms import ONE_ROW, PLAIN, REFERENCES
from ds4jax.experiments.runs_csv import Run
from ds4jax.experiments.timing import Cost, Estimate, estimate, slower

GATE_TOLERANCE = 0.02
"""How much slower than the better of plain and ungated the gate may make an arm."""


def counted(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that count: all but those of the first round."""
    return [run for run in runs if run.round > 0]


def paired(over: Sequence[Run], under: Sequence[Run]) -> list[float]:
    """Return `over.seconds / under.seconds` of runs of one text, seed and round."""
    found = {run.key[1:]: run for run in over}
    return [
        found[run.key[1:]].seconds / run.seconds
        for run in under
        if run.key[1:] in found
    ]


@dataclasses.dataclass(frozen=True)
class Summary:
    """An arm on a text, over all seeds and rounds that count.

    Attributes:
      runs: those, at least one.
      rate: tokens per second.
      speedup: over the faster plain decoding, run by run.
      cost: of a cycle, in passes of that plain decoding, medians.  Of an arm with the
        gate, of its cycles on average, the plain ones among them.
      target_ms, draft_ms: of a cycle that drafts, medians.
      cycle_ms: of any cycle, median.
      accepted_per_cycle: drafts.
      alpha: share of the drafts verified that were accepted, any place; NaN for none.
      places: that share, by place.
      same: whether the tokens of every run are those of plain decoding's exact class.
    """

    runs: Sequence[Run]
    rate: Estimate
    speedup: Estimate
    cost: Cost
    target_ms: float
    draft_ms: float
    cycle_ms: float
    accepted_per_cycle: float
    alpha: float
    places: Sequence[float]
    same: bool

    @property
    def arm(self) -> str:
        """Return the arm's name."""
        return self.runs[0].arm

    @property
    def text(self) -> str:
        """Return the text's name."""
        return self.runs[0].text

    @property
    def rest_ms(self) -> float:
        """Return what a cycle took beside targets and drafts; NaN with the gate.

        Below 0 if the passes took longer when measured alone.
        """
        run = self.runs[0]
        if run.gate:
            return float("nan")
        return self.cycle_ms - self.target_ms - self.draft_ms

    @property
    def reads_per_token(self) -> float:
        """Return how often a token had the shared weights read: its target passes."""
        return self.total("passes") / self.total("tokens")

    @property
    def predicted(self) -> float:
        """Return the cost model's speed-up."""
        return self.cost.speedup(self.accepted_per_cycle)

    def total(self, column: str) -> int:
        """Return a column's sum over the runs."""
        return sum(getattr(run, column) for run in self.runs)


def faster_plain(runs: Sequence[Run]) -> str:
    """Return which plain decoding was faster, of runs of one text."""
    arms = [[run for run in runs if run.arm == arm.name] for arm in REFERENCES]
    return min(arms, key=_median_seconds)[0].arm


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """Return a summary of every arm on every text, in the order of the runs."""
    runs = counted(runs)
    found = []
    for text in dict.fromkeys(run.text for run in runs):
        here = [run for run in runs if run.text == text]
        reference = faster_plain(here)
        arms: dict[str, list[Run]] = {}
        for run in sorted(here, key=_order):
            arms.setdefault(run.arm, []).append(run)
        found += [_summary(own, arms, reference) for own in arms.values()]
    return found


def _order(run: Run):
    """Sort plain decoding first, then by mode and depth, variants behind."""
    plain = run.mode == "plain"
    return not plain, run.mode != "continuous", len(run.arm.split()), run.depth


def _summary(own: Sequence[Run], arms: dict[str, list[Run]], reference: str) -> Summary:
    """Summarise the runs of one arm; `arms` are those of all arms on the text."""
    plain = statistics.median(run.target_ms for run in arms[reference])
    resting = statistics.median(run.target_ms for run in arms[PLAIN.name]) / plain
    target_ms = statistics.median(run.target_ms for run in own)
    draft_ms = statistics.median(run.draft_ms for run in own)
    cycles = sum(run.cycles for run in own)
    drafted = [sum(place) for place in zip(*(run.drafted for run in own), strict=True)]
    accepted = [
        sum(place) for place in zip(*(run.accepted for run in own), strict=True)
    ]
    share = _drafting(own)
    base = 1.0 + share * (own[0].mode == "chained")
    cost = Cost(
        r=share * target_ms / plain + (1 - share) * resting,
        d=share * draft_ms / plain,
        base=base,
    )
    tokens = {(run.seed, run.sha256) for run in arms[PLAIN.name]}
    return Summary(
        runs=own,
        rate=estimate([run.tokens_per_second for run in own]),
        speedup=estimate(paired(arms[reference], own)),
        cost=cost,
        target_ms=target_ms,
        draft_ms=draft_ms,
        cycle_ms=statistics.median(1e3 * run.seconds / run.cycles for run in own),
        accepted_per_cycle=sum(accepted) / cycles,
        alpha=sum(accepted) / sum(drafted) if sum(drafted) else float("nan"),
        places=[a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)],
        same=all((run.seed, run.sha256) in tokens for run in own),
    )


def _drafting(own: Sequence[Run]) -> float:
    """Return the share of cycles that draft, of runs of one arm."""
    if not own[0].gate:
        return 1.0
    drafting = sum(run.drafted[0] + run.cold_cycles for run in own)
    return drafting / sum(run.cycles for run in own)


@dataclasses.dataclass(frozen=True)
class GateCheck:
    """Whether the gate keeps an arm from being slower than what it chooses between.

    Attributes:
      arm: with the gate.
      text: on which text.
      better: the faster of the same arm without the gate, and plain decoding in the
        exact class, which is what the gate turns to.
      slower: how much slower than it, as a share, by the turns' medians; below 0 if
        faster.
      by_counters: the same, had each cycle taken what its passes take alone.  It knows
        nothing of what else a cycle takes, and nothing of a machine that others use.
      slower_than_one_row: the same, against plain decoding by passes of one row.
    """

    arm: str
    text: str
    better: str
    slower: Estimate
    by_counters: float
    slower_than_one_row: Estimate

    @property
    def holds(self) -> bool:
        """Say whether `slower` is within GATE_TOLERANCE."""
        return self.slower.median <= GATE_TOLERANCE


def check_gates(runs: Sequence[Run]) -> list[GateCheck]:
    """Return a check of every arm with the gate whose ungated one is there too."""
    arms: dict[tuple[str, str], list[Run]] = {}
    for run in counted(runs):
        arms.setdefault((run.text, run.arm), []).append(run)
    found = []
    for (text, arm), own in arms.items():
        ungated = arms.get((text, arm.removesuffix(" gate")))
        if not own[0].gate or not ungated:
            continue
        plain, one_row = arms[text, PLAIN.name], arms[text, ONE_ROW.name]
        better = min(ungated, plain, key=_median_seconds)
        found.append(
            GateCheck(
                arm=arm,
                text=text,
                better=better[0].arm,
                slower=_slower(own, better),
                by_counters=_slower_by_counters(own, ungated, plain),
                slower_than_one_row=_slower(own, one_row),
            )
        )
    return found


def _median_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def _slower(own: Sequence[Run], rival: Sequence[Run]) -> Estimate:
    """Return how much slower an arm is than another, as a share."""
    return slower(_turns(own), _turns(rival))


def _turns(runs: Sequence[Run]) -> list[list[float]]:
    """Return the seconds by round and turn, those of all seeds."""
    rounds: dict[int, list[float]] = {}
    for run in sorted(runs, key=lambda run: (run.round, run.seed)):
        rounds.setdefault(run.round, []).extend(run.turns)
    return list(rounds.values())


def _slower_by_counters(
    own: Sequence[Run], ungated: Sequence[Run], plain: Sequence[Run]
) -> float:
    """Return `GateCheck.by_counters`; cycles that draft take what ungated ones do."""
    one_pass = statistics.median(run.target_ms for run in plain)
    cycle = statistics.median(run.target_ms + run.draft_ms for run in ungated)

    def per_token(runs):
        share, tokens = _drafting(runs), sum(run.tokens for run in runs)
        cycles = sum(run.cycles for run in runs)
        return (share * cycle + (1 - share) * one_pass) * cycles / tokens

    return per_token(own) / min(one_pass, per_token(ungated)) - 1
