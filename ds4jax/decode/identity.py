"""The identity matrix: every way of decoding a prompt, and what each is held to.

A run is of one mode after one prompt, greedy, past any end-of-sequence token.  What
decides it, by name:

* `tokens`: those of plain decoding, the hash of which a run of class G must have.
* `again`: a second run has the same.
* `gap`: ds4's oracle, `--cont-argmax-gap` for a continuous run and `--mtp-verify-depth`
  for others, exactly 0 for class G; `diverged` is the share of tokens that plain
  decoding would not have chosen, which is told and not judged.
* `drafts`: as many were verified and accepted, place by place, as by the replay's own
  drafts there have to be.
* `trunk`, `anchor`, `head`: the state left behind is the replay's (`replay.distances`).

The drafts and the state of class G are held to bits.  Those of a batched verifier may
drift with its sums: they have to stay near.

Source: antirez/ds4#371's hash matrix (SPECULATION §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.decode import carry as carries
from ds4jax.decode import driver, oracles
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode, OutputClass
from ds4jax.decode.oracles import Verdict
from ds4jax.decode.precedence import Ds4Flags, resolve
from ds4jax.decode.replay import Replay, distance, distances, replay, schedule, whole
from ds4jax.errors import CapacityError
from ds4jax.model.deepseek import Model

NEAR = 0.1
"""Most that a batched verifier's state may be off, relative to its norm: what rounding
adds up to over a text stays far below, and a row of another token is at about 1."""

LEAST_ACCEPTED = 0.9
"""Share of the replay's accepted drafts that such a run must accept at least, and of
its guesses that a pass over the whole text must make: near ties fall either way."""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of decoding to check.

    Attributes:
      name: of the run, in words.
      mode: how to decode.
      output_class: what is promised of its tokens.
      head: whether the state of a head is kept.
    """

    name: str
    mode: Mode
    output_class: OutputClass
    head: bool = True


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
      figure: what was found, in words.
      passes: whether it is as it must be; None if it is told alone.
    """

    figure: str
    passes: bool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      prompt: name of the prompt, or of the case.
      run: what was done.
      output_class: promised; empty where none is.
      digest: sha256 of the tokens; empty where there are none.
      checks: by name.
    """

    prompt: str
    run: str
    output_class: str
    digest: str
    checks: dict[str, Check]

    @property
    def failures(self) -> list[str]:
        """Return the names of the checks that fail."""
        return [name for name, c in self.checks.items() if c.passes is False]


_MATRIX = (
    ("no --mtp", 1, False, ()),
    ("--mtp_draft=1", 1, False, ()),
    ("--mtp_draft=1, CONTINUOUS", 1, False, ("CONTINUOUS",)),
    ("--mtp_draft=2", 2, False, ()),
    ("--mtp_draft=2 --quality", 2, True, ()),
    ("--mtp_draft=2, STRICT", 2, False, ("STRICT",)),
    ("--mtp_draft=2, CONTINUOUS", 2, False, ("CONTINUOUS",)),
    ("--mtp_draft=2, CONTINUOUS STRICT", 2, False, ("CONTINUOUS", "STRICT")),
    ("--mtp_draft=2, CONTINUOUS SPEC_DISABLE", 2, False,
     ("CONTINUOUS", "SPEC_DISABLE")),
    ("--mtp_draft=4", 4, False, ()),
    ("--mtp_draft=4, STRICT", 4, False, ("STRICT",)),
)  # fmt: skip
"""antirez/ds4#371's and more: name, N, `--quality`, and the `DS4_MTP_` switches set."""


def ways(mtp: bool, most_depth: int) -> tuple[Way, ...]:
    """Return what to check: plain decoding first, our modes, then ds4's flags.

    Args:
      mtp: whether there is a head; plain decoding is all there is without.
      most_depth: drafts of a cycle at most; deeper ways are left out.
    """
    plain = Way("plain", GREEDY.mode, "G", head=mtp)
    if not mtp:
        return (plain,)
    found = [plain]
    for kind in ("chained", "continuous"):
        for depth in range(1, most_depth + 1):
            found.append(Way(f"{kind} {depth}, exact", Mode(kind, depth), "G"))
        for depth in range(1, most_depth + 1):
            mode = Mode(kind, depth, "batched")
            found.append(Way(f"{kind} {depth}, batched", mode, "near-greedy"))
    for name, draft, quality, switches in _MATRIX:
        head = name != "no --mtp"
        asked = Ds4Flags(mtp=head, mtp_draft=draft, quality=quality)
        chosen = resolve(asked, {f"DS4_MTP_{switch}": "1" for switch in switches})
        if chosen.mode.depth <= most_depth:
            found.append(Way(f"ds4 {name}", chosen.mode, chosen.output_class, head))
    return tuple(found)


@dataclasses.dataclass
class Checked:
    """What is known of one prompt: each mode's run, each text's replay and oracle."""

    model: Model
    started: dict[bool, DecodeCarry]
    max_tokens: int
    prompt_length: int
    runs: dict[tuple[Mode, bool], tuple[DecodeCarry, bool]]
    replays: dict[tuple[str, bool], Replay]
    verdicts: dict[str, Verdict]

    def run(self, mode: Mode, head: bool) -> tuple[DecodeCarry, bool]:
        """Return the carry after a run, and whether a second one had its tokens."""
        if (mode, head) not in self.runs:
            decoding, ends = Decoding(mode=mode), []
            for _ in range(2):
                carry = jax.tree.map(jnp.copy, self.started[head])
                carry = carries.with_budget(carry, self.max_tokens)
                ends.append(driver.run(self.model, carry, decoding))
            same = driver.committed(ends[0]) == driver.committed(ends[1])
            self.runs[mode, head] = ends[0], same
        return self.runs[mode, head]

    def replay(self, tokens: list[int], head: bool) -> Replay:
        """Return the replay of these tokens after the prompt."""
        key = driver.digest(tokens), head
        if key not in self.replays:
            self.replays[key] = replay(self.model, self.started[head], tokens)
        return self.replays[key]

    def verdict(self, tokens: list[int], way: Way, counts: dict[str, int]) -> Verdict:
        """Return the oracle's, of which the gaps depend on the tokens alone."""
        key = driver.digest(tokens)
        if key not in self.verdicts:
            context = self.started[way.head].max_context
            read = driver.committed(self.started[way.head])
            self.verdicts[key] = oracles.verify_depth(
                self.model, [*read, *tokens], len(read), GREEDY, max_context=context
            )
        exact = way.output_class == "G"
        # A margin that lets no draft pass leaves plain decoding, which needs none.
        shut = way.mode.margin > 0 and not counts["drafted"]
        return dataclasses.replace(
            self.verdicts[key],
            kind="plain" if shut else way.mode.kind,
            accepted=counts["accepted"],
            tolerance=oracles.EXACT_TOLERANCE if exact else oracles.TIE_TOLERANCE,
        )


def check(
    model: Model,
    prompts: dict[str, list[int]],
    max_tokens: int,
    which: Sequence[Way],
    each: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Yield a row for every prompt and way, and one for each prompt alone.

    Args:
      model: the model.
      prompts: ids by name.
      max_tokens: to decode after each; more than `oracles.MORE_THAN`.
      which: plain decoding first, of which the others are told whether they differ.
      each: called after every row.

    Raises:
      TokenError: if a prompt is empty or an id is not in the vocabulary.
      CapacityError: if the model cannot hold such a text.
    """
    if max_tokens <= oracles.MORE_THAN:
        raise CapacityError(
            f"max_tokens: expected more than {oracles.MORE_THAN}, as ds4's oracle does,"
            f" found {max_tokens}"
        )
    # One size for all prompts: then a mode compiles once.
    context = max(map(len, prompts.values())) + max_tokens
    for name, prompt in prompts.items():
        started = {
            head: driver.prefill(
                model,
                driver.create(model, context, how, head=head),
                prompt,
                how,
            )
            for head in {way.head for way in which}
            for how in [CONTINUOUS if head else GREEDY]
        }
        known = Checked(model, started, max_tokens, len(prompt), {}, {}, {})
        plain = driver.committed(known.run(which[0].mode, which[0].head)[0])
        yield _whole_text(name, known, plain[len(prompt) :], which[0].head)
        for way in which:
            yield _row(name, known, way, plain[len(prompt) :])
            each()


def _whole_text(name: str, known: Checked, plain: list[int], head: bool) -> Row:
    """Hold the steps of a replay to one pass over the whole text."""
    carry = known.started[head]
    steps = known.replay(plain, head)
    once = whole(known.model, steps, carry.max_context)
    checks = {"gap": _at_most(once.worst, oracles.TIE_TOLERANCE)}
    if carry.anchor is not None:
        same = int(np.sum(once.guesses == steps.guesses[:, 0]))
        enough = same >= LEAST_ACCEPTED * len(plain)
        checks["drafts"] = Check(f"{same} of {len(plain)} alike", enough)
        apart = distance(carry.anchor.streams[0, 0], once.newest)
        checks["anchor"] = _at_most(apart, NEAR)
    return Row(name, "in a single pass", "", driver.digest(plain), checks)


def _row(name: str, known: Checked, way: Way, plain: list[int]) -> Row:
    carry, same = known.run(way.mode, way.head)
    tokens = driver.committed(carry)[known.prompt_length :]
    exact = way.output_class == "G"
    counts = carry.statistics.of()
    verdict = known.verdict(tokens, way, counts)
    idle = "" if verdict.kind == "plain" or verdict.accepted else ", no draft accepted"
    steps = known.replay(tokens, way.head)
    checks = {
        "tokens": _compare(tokens, plain, exact),
        "again": Check("same" if same else "other", same),
        "gap": Check(f"{verdict.worst:.3g}{idle}", verdict.passes),
        "diverged": Check(f"{verdict.divergence.rate:.1%}"),
        "drafts": _drafts(carry, steps, way.mode, exact),
    }
    most = 0.0 if exact else NEAR
    for part, apart in distances(carry, steps, known.model.config).items():
        checks[part] = _at_most(apart, most)
    return Row(name, way.name, way.output_class, driver.digest(tokens), checks)


def _compare(tokens: list[int], plain: list[int], must: bool) -> Check:
    if tokens == plain:
        return Check("plain's", True if must else None)
    pairs = enumerate(zip(tokens, plain, strict=False))
    shorter = min(len(tokens), len(plain))
    at = next((i for i, (a, b) in pairs if a != b), shorter)
    return Check(f"other from {at} on", False if must else None)


def _drafts(carry: DecodeCarry, steps: Replay, mode: Mode, exact: bool) -> Check:
    """Hold the counters to those of the replay's drafts."""
    wanted = schedule(steps, mode)
    counted = vars(carry.statistics)
    found = {name: np.ravel(counted[name][0]).tolist() for name in wanted}
    accepted, drafted = sum(found["accepted"]), sum(found["drafted"])
    figure = f"{accepted} of {drafted}"
    if found == wanted:
        return Check(figure, True)
    due = sum(wanted["accepted"])
    passes = not exact and accepted >= LEAST_ACCEPTED * due
    return Check(f"{figure}, not {due} of {sum(wanted['drafted'])}", passes)


def _at_most(found: float, most: float) -> Check:
    return Check(f"{found:.3g}", found <= most)
