"""What ds4's flags and switches come to: its table, the margin, logs, and mistakes.

Numbers in docstrings are those of SPECULATION §7; what is expected is written from its
§1.4 and §1.5, with the corrections that `precedence` lists, and not from `PRECEDENCE`.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.decode import precedence
from ds4jax.decode.modes import Mode
from ds4jax.decode.precedence import Ds4Flags, Logs, resolve
from ds4jax.errors import ConfigError

DECIDING = ("CONTINUOUS", "STRICT", "SPEC_DISABLE", "BATCH_VERIFY")
LOGGING = ("SPEC_LOG", "TIMING", "CONF_LOG", "PROBE")
"""In the order of `Logs`."""
EFFECTLESS = ("CAPTURE_PREFIX1", "FORCE_SNAPSHOT", "EXACT_REPLAY", "FULL_LOGITS")
UNKNOWN = (
    "DS4_MTP_", "DS4_MTP_NEW", "ds4_mtp_strict", "MTP_CONTINUOUS", "DS4_CONTINUOUS",
    "DS4_METAL_GRAPH_RAW_CAP", "PATH", "",
)  # fmt: skip
ALL = (*DECIDING, *LOGGING, *EFFECTLESS, "MIN_MARGIN")


def env(names: Collection[str] = (), value: str = "1", **named: str) -> dict[str, str]:
    """Return an environment, by names without their prefix."""
    return {f"DS4_MTP_{name}": value for name in names} | {
        f"DS4_MTP_{name}": text for name, text in named.items()
    }


def subsets(names: Collection[str]) -> list[tuple[str, ...]]:
    return [
        some for n in range(len(names) + 1) for some in itertools.combinations(names, n)
    ]


# Each of these takes away what made the one before it apply and leaves all else on, so
# whatever could apply further down does.
EVERYTHING = Ds4Flags(mtp=False, mtp_draft=1, quality=True)
HEAD = dataclasses.replace(EVERYTHING, mtp=True)
DRAFTS = dataclasses.replace(HEAD, mtp_draft=4)
LAX = dataclasses.replace(DRAFTS, quality=False)
NOT_OFF = ("CONTINUOUS", "STRICT", "BATCH_VERIFY")
TABLE = [
    ("1", EVERYTHING, DECIDING, Mode("plain", 0), "G", "plain"),
    (
        "2", dataclasses.replace(EVERYTHING, temperature=0.5), DECIDING,
        Mode("plain", 0), "sampled", "plain",
    ),
    (
        "2", dataclasses.replace(DRAFTS, temperature=0.5), DECIDING,
        Mode("plain", 0), "sampled", "plain",
    ),
    ("3", HEAD, DECIDING, Mode("plain", 0), "G", "plain"),
    ("4", DRAFTS, DECIDING, Mode("plain", 0), "G", "plain"),
    (
        "5a", DRAFTS, ("CONTINUOUS", "BATCH_VERIFY"),
        Mode("chained", 3, "batched"), "near-greedy", "chained, depth N - 1, batched",
    ),
    (
        "5a", LAX, NOT_OFF,
        Mode("chained", 3, "batched"), "near-greedy", "chained, depth N - 1, batched",
    ),
    (
        "5", DRAFTS, ("CONTINUOUS",),
        Mode("chained", 3), "G", "chained, depth N - 1, exact",
    ),
    (
        "5", dataclasses.replace(LAX, mtp_draft=2), ("CONTINUOUS", "STRICT"),
        Mode("chained", 1), "G", "chained, depth N - 1, exact",
    ),
    (
        "6", LAX, ("CONTINUOUS", "BATCH_VERIFY"),
        Mode("continuous", 1, "batched"), "M'", "continuous, depth 1, batched",
    ),
    (
        "6", dataclasses.replace(LAX, mtp_draft=2), ("CONTINUOUS",),
        Mode("continuous", 1, "batched"), "M'", "continuous, depth 1, batched",
    ),
    (
        "8", dataclasses.replace(LAX, mtp_draft=2), ("BATCH_VERIFY",),
        Mode("chained", 1, "batched", 3.0), "M",
        "chained, depth N - 1, batched, margin gate",
    ),
    (
        "9", LAX, ("BATCH_VERIFY",),
        Mode("chained", 3, "batched"), "near-greedy", "chained, depth N - 1, batched",
    ),
    (
        "9", dataclasses.replace(LAX, mtp_draft=3), (),
        Mode("chained", 2, "batched"), "near-greedy", "chained, depth N - 1, batched",
    ),
]  # fmt: skip
EVENTS = {"7", "10", "11"}
"""Rows of ds4 that happen inside a cycle: no anchor, and a verifier that fails."""


@pytest.mark.parametrize(
    "number, flags, on, mode, output_class, words",
    TABLE,
    ids=[f"{row[0]}-{i}" for i, row in enumerate(TABLE)],
)
def test_the_first_row_that_applies_decides(
    number, flags, on, mode, output_class, words
):
    """Property 19, row by row.

    Seen red with rows 5a and 5, 5 and 6, 3 and 4, 2 and 3 in turn swapped, and with
    strictness by `--quality` only.
    """
    found = resolve(flags, env(on))
    assert found.row.number == number
    assert found.mode == mode
    assert found.output_class == found.row.output_class == output_class
    assert found.row.words == words


def test_the_rows_are_ds4s():
    """Property 19: each of 1 to 11 but for events, 5a first of the two it is in."""
    numbers = [row.number for row in precedence.PRECEDENCE]
    assert numbers == list(dict.fromkeys(row[0] for row in TABLE))
    assert {*numbers} | EVENTS == {*map(str, range(1, 12)), "5a"}
    assert not {*numbers} & EVENTS


def expected(flags: Ds4Flags, on: Collection[str]) -> tuple[Mode, str]:
    """Return mode and output class by what ds4 does, step by step (§1.3 to §1.5)."""
    if flags.temperature > 0:
        return Mode("plain", 0), "sampled"
    if not flags.mtp or flags.mtp_draft < 2 or "SPEC_DISABLE" in on:
        return Mode("plain", 0), "G"
    depth = min(flags.mtp_draft, 5) - 1
    if flags.quality or "STRICT" in on:
        if "BATCH_VERIFY" in on:
            return Mode("chained", depth, "batched"), "near-greedy"
        return Mode("chained", depth, "exact"), "G"
    if "CONTINUOUS" in on:
        return Mode("continuous", 1, "batched"), "M'"
    if depth == 1:
        return Mode("chained", 1, "batched", flags.mtp_margin), "M"
    return Mode("chained", depth, "batched"), "near-greedy"


def every_flags():
    """Yield ds4's flags in every combination that could matter."""
    for mtp, draft, quality, temperature, margin in itertools.product(
        (False, True), (-1, 0, 1, 2, 3, 4, 5, 6, 16, 99), (False, True),
        (-1.0, 0.0, 1e-6, 1.0), (0.0, 3.0),
    ):  # fmt: skip
        yield Ds4Flags(
            mtp=mtp, mtp_draft=draft, quality=quality, temperature=temperature,
            mtp_margin=margin,
        )  # fmt: skip


@pytest.mark.parametrize("on", subsets(DECIDING), ids=" ".join)
def test_every_combination_is_as_ds4_takes_it(on):
    """Properties 19 and 20, enumerated.

    Seen red with strictness by the switch only, with `mtp_draft < 1` in row 3, with a
    gate in row 9, and with sampling from temperature 0 on.
    """
    for flags in every_flags():
        found = resolve(flags, env(on))
        assert (found.mode, found.output_class) == expected(flags, on), flags


BASES = [*dict.fromkeys((flags, on) for _, flags, on, *_ in TABLE)]
"""Flags and switches by which each row is reached."""


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*env(ALL), *UNKNOWN]) | st.text(),
        st.sampled_from(["", "0", "1", "50", "nan", "no"]) | st.text(),
    )
)
def test_the_environment_alone_does_nothing(environment):
    """Property 20: without a head, and at ds4's default N = 1, decoding is plain.

    Seen red with a row 6 that stands above row 3.
    """
    assert Ds4Flags().mtp_draft == 1
    for flags in (
        Ds4Flags(), Ds4Flags(mtp=True), Ds4Flags(mtp_draft=4),
        Ds4Flags(mtp_draft=2, quality=True), Ds4Flags(mtp=True, quality=True),
    ):  # fmt: skip
        found = resolve(flags, environment)
        assert (found.mode, found.output_class) == (Mode("plain", 0), "G")
        assert found.notes == ()


@pytest.mark.parametrize("flags, on", BASES, ids=range(len(BASES)))
def test_a_switch_is_on_whatever_it_is_set_to(flags, on):
    """Seen red with switches that are on when not empty, and when not 0."""
    expected = resolve(flags, env((*on, *LOGGING)))
    assert expected.logs == Logs(True, True, True, True)
    for value in ("", "0", "no", "off", "false"):
        assert resolve(flags, env((*on, *LOGGING), value)) == expected


@pytest.mark.parametrize("flags, on", BASES, ids=range(len(BASES)))
def test_logs_are_all_that_their_switches_change(flags, on):
    """Seen red with a probe that drafts, and with two switches taken for each other."""
    silent = resolve(flags, env(on))
    assert silent.logs == Logs()
    for some in subsets(LOGGING):
        logs = Logs(*(name in some for name in LOGGING))
        found = resolve(flags, env((*on, *some)))
        assert found == dataclasses.replace(silent, logs=logs)


@pytest.mark.parametrize("flags, on", BASES, ids=range(len(BASES)))
def test_other_variables_change_nothing(flags, on):
    """Seen red with names in small letters that count, and a switch that begins so."""
    found = resolve(flags, env(on))
    for some in subsets(EFFECTLESS):
        for value in ("", "0", "1"):
            others = env(some, value) | dict.fromkeys(UNKNOWN, value)
            assert resolve(flags, env(on) | others) == found


GATED = Ds4Flags(mtp=True, mtp_draft=2)


def gate(text: str | None = None, **flags: Any) -> tuple[float, tuple[str, ...]]:
    """Return the threshold of ds4's draft-2 cycle, and the notes."""
    named = {} if text is None else {"MIN_MARGIN": text}
    found = resolve(dataclasses.replace(GATED, **flags), env(**named))
    assert (found.row.number, found.mode.depth) == ("8", 1)
    return found.mode.margin, found.notes


def test_a_margin_is_the_flags():
    """Property 22: 3 by default, and 0 is no gate."""
    assert gate() == (3.0, ())
    for margin in (0.0, 0.25, 1000.0):
        assert gate(mtp_margin=margin) == (margin, ())


@pytest.mark.parametrize(
    "text, margin",
    [("7.5", 7.5), ("0", 0.0), ("0.0", 0.0), ("1e2", 100.0), ("1000", 1000.0)],
)
def test_the_environment_overrides_a_margin(text, margin):
    """Property 22.  Seen red with a threshold of 0 that does not override."""
    for flag in (0.0, 3.0, 9.0):
        assert gate(text, mtp_margin=flag) == (margin, ())


@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "-0.001", "-inf", "nan", "3,5", "3\n5"]
)
def test_a_bad_margin_in_the_environment_is_ignored(text):
    """Property 22, and the user is told in one line.

    Seen red with `margin < 0` as the test, which lets NaN through.
    """
    margin, [note] = gate(text, mtp_margin=2.5)
    assert margin == 2.5
    assert note == (
        f"DS4_MTP_MIN_MARGIN: expected a number of at least 0, found {text!r}; "
        "mtp_margin=2.5 holds"
    )
    assert "\n" not in note


@pytest.mark.parametrize("text", ["1000.5", "1e9", "inf"])
def test_a_margin_of_the_environment_is_cut(text):
    """Seen red without the cut: `Mode` raises."""
    assert gate(text) == (1000.0, (f"DS4_MTP_MIN_MARGIN: cut from {text!r} to 1000",))


@pytest.mark.parametrize("text", ["0", "50", "5000", "nan", "x"])
def test_only_the_gated_row_has_a_margin(text):
    """Property 22: no other row looks at it.  Seen red with a gate in row 9."""
    for flags, on in BASES:
        without = resolve(flags, env(on))
        if without.row.number != "8":
            assert without.mode.margin == 0
            assert resolve(flags, env(on, MIN_MARGIN=text)) == without


@pytest.mark.parametrize("draft", [6, 7, 16, 17, 10**9])
def test_drafts_are_cut_and_it_is_said(draft):
    """Seen red with a cut to N - 1 = 5.  Continuous decoding is of depth 1 anyway."""
    note = f"mtp_draft: cut from {draft} to 5, the most here"
    flags = Ds4Flags(mtp=True, mtp_draft=draft)
    for on, notes in (
        ((), 1), (("STRICT", "BATCH_VERIFY"), 1), (("STRICT",), 2),
        (("CONTINUOUS",), 0), (("SPEC_DISABLE",), 0),
    ):  # fmt: skip
        found = resolve(flags, env(on))
        assert len(found.notes) == notes
        if notes:
            assert (found.mode.depth, found.notes[0]) == (4, note)


@pytest.mark.parametrize("draft", [-1, 0, 1, 2, 3, 4, 5])
def test_nothing_is_said_where_nothing_is_otherwise(draft):
    """But of strict drafts: more than two at once are exact here, and not in ds4."""
    flags = Ds4Flags(mtp=True, mtp_draft=draft)
    for on in subsets(DECIDING):
        found = resolve(flags, env(on))
        if found.row.number == "5" and draft > 2:
            assert found.notes == (
                "strict: exact at every depth; ds4 is so at two drafts only",
            )
        else:
            assert found.notes == ()


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("mtp_margin", (-0.5, 1000.5, math.nan, math.inf), "a number in 0..1000"),
        ("temperature", (math.nan, math.inf, -math.inf), "a finite number"),
    ],
)
def test_flags_that_mean_nothing_are_told_in_one_line(name, values, expected):
    for value in values:
        with pytest.raises(ConfigError) as told:
            Ds4Flags(**{name: value})
        assert str(told.value) == f"{name}: expected {expected}, found {value!r}"


def test_the_table_is_markdown():
    """Seen red with a `|` in a condition, and with a row that lacks a cell."""
    head, rule, *rows = (line.split("|") for line in precedence.table().splitlines())
    for line in (head, rule, *rows):
        assert (line[0], line[-1], len(line)) == ("", "", 2 + 5)
    assert {*rule[1:-1]} == {" --- "}
    found = [tuple(cell.strip() for cell in line[1:-1]) for line in rows]
    shown = [(number, mode, output_class) for number, _, mode, output_class, _ in found]
    told = [(number, words, name) for number, *_, name, words in TABLE]
    assert shown == list(dict.fromkeys(told))
    assert len(rows) == len(precedence.PRECEDENCE)
    assert all(condition for _, condition, *_ in found)


def test_the_readme_shows_the_table():
    readme = Path(__file__).parent.parent / "README.md"
    assert precedence.table() in readme.read_text(encoding="utf-8")
