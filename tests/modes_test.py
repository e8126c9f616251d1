"""Ways of decoding: which there are, what a wrong one is told, and how they compare.

Numbers in docstrings are those of SPECULATION §7.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from ds4jax.decode.gate import Gate
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode
from ds4jax.errors import ConfigError

KINDS: Any = ("plain", "chained", "continuous", "eager", "", None)
DEPTHS: Any = (-1, 0, 1, 2, 3, 4, 5, 1.0, True, None)
VERIFIERS: Any = ("exact", "batched", "fast", None)
MARGINS: Any = (
    0,
    0.0,
    0.5,
    1000.0,
    -0.5,
    1000.5,
    math.nan,
    math.inf,
    True,
    "3",
    None,
)

POSSIBLE = {
    ("plain", 0, "exact", 0.0),
    *itertools.product(
        ("chained", "continuous"), (1, 2, 3, 4), ("exact", "batched"), (0.0,)
    ),
    ("chained", 1, "batched", 0.5),
    ("chained", 1, "batched", 1000.0),
}
"""The modes of the product of the above that mean something."""
MODES = [Mode(*words) for words in sorted(POSSIBLE)]


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Check no annotations, which would catch a wrong type before its own check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def told(make, *words, **named) -> str:
    """Return the one line that a mistake is told in."""
    with pytest.raises(ConfigError) as caught:
        make(*words, **named)
    line = str(caught.value)
    assert re.fullmatch(r"\w+: expected [^,]+(, [^,]+)*, found .+", line), line
    return line


def test_only_what_means_something_is_a_mode():
    """Of every combination; an impossible one is told about a setting that it has.

    Seen red with a margin allowed at any depth, with a plain batched mode, and with
    depths compared by `==` alone, which takes `True`.
    """
    made = 0
    names = [field.name for field in dataclasses.fields(Mode)]
    for words in itertools.product(KINDS, DEPTHS, VERIFIERS, MARGINS):
        if words in POSSIBLE and type(words[1]) is int:
            mode = Mode(*words)
            assert dataclasses.astuple(mode) == words
            made += 1
        else:
            line = told(Mode, *words)
            name = line.partition(":")[0]
            assert line.endswith(f", found {words[names.index(name)]!r}")
    # 0 and 0.0 are both no margin.
    assert made == 2 * 17 + 2


@pytest.mark.parametrize(
    "words, message",
    [
        (("eager", 1), "kind: expected plain, chained or continuous, found 'eager'"),
        (("pl\nain", 0), r"kind: expected plain, chained or continuous, found 'pl\n"),
        (("plain", 1), "depth: expected 0 when plain, found 1"),
        (("chained", 0), "depth: expected 1..4 when chained, found 0"),
        (("continuous", 5), "depth: expected 1..4 when continuous, found 5"),
        (("plain", 0, "batched"), "verifier: expected exact when plain, found 'b"),
        (("chained", 1, "f"), "verifier: expected exact or batched, found 'f'"),
        (("chained", 1, "batched", 1001), "margin: expected a number in 0..1000, "),
        (("chained", 2, "batched", 3.0), "margin: expected 0 unless chained, batched"),
        (("chained", 1, "exact", 3.0), "margin: expected 0 unless chained, batched"),
        (("continuous", 1, "batched", 3.0), "margin: expected 0 unless chained, "),
    ],
)  # fmt: skip
def test_an_impossible_mode_is_told_in_one_line(words, message):
    assert told(Mode, *words).startswith(message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prefill_chunk": 0}, "prefill_chunk: expected at least 1, found 0"),
        ({"prefill_chunk": -8}, "prefill_chunk: expected at least 1, found -8"),
        ({"policy": "cold"}, "policy: expected warm or parity, found 'cold'"),
        ({"pairing": "none"}, "pairing: expected trained or ds4, found 'none'"),
        ({"temperature": -0.1}, "temperature: expected 0, or a finite number from"),
        ({"temperature": math.inf}, "temperature: expected 0, or a finite number from"),
        ({"temperature": math.nan}, "temperature: expected 0, or a finite number from"),
        ({"temperature": 1e-9}, "temperature: expected 0, or a finite number from"),
    ],
)  # fmt: skip
def test_an_impossible_decoding_is_told_in_one_line(changes, message):
    assert told(Decoding, mode=CONTINUOUS.mode, **changes).startswith(message)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_chunk_cuts_the_depth(mode):
    """Property 26: a verification is of 1 + depth rows, never more than a chunk has.

    One row is none to draft for, which is plain decoding (antirez/ds4#381).  Seen red
    with a chunk of as many rows as there are drafts.
    """
    for rows in range(1, 8):
        depth = Decoding(mode=mode, prefill_chunk=rows).depth
        assert depth == (mode.depth if 1 + mode.depth <= rows else rows - 1)
    assert Decoding(mode=mode).depth == mode.depth


def test_the_constants_are_the_defaults():
    assert GREEDY == Decoding(mode=Mode("plain", 0, "exact", 0.0))
    assert CONTINUOUS == Decoding(mode=Mode("continuous", 1, "exact", 0.0))
    for how in (GREEDY, CONTINUOUS):
        assert (how.policy, how.fill, how.temperature) == ("warm", True, 0)
        assert how.gate is None


CHANGES: list[dict[str, Any]] = [
    {},
    *({"mode": mode} for mode in MODES if mode != CONTINUOUS.mode),
    {"policy": "parity"},
    {"fill": False},
    {"temperature": 0.5},
    {"gate": Gate()},
    {"gate": Gate(patience=2.5)},
    {"prefill_chunk": 8},
]


def test_a_way_of_decoding_is_a_static_argument():
    """Equal ones share a compiled program, and others do not.

    Seen red with a `Decoding` that is not frozen, which has no hash, with one that
    compares by identity, and with its mode left out of the comparison.
    """
    traced = []

    def trace(x, how):
        traced.append(how)
        return x + how.depth

    program = jax.jit(trace, static_argnames="how")
    hows = [dataclasses.replace(CONTINUOUS, **changes) for changes in CHANGES]
    for how in hows + [dataclasses.replace(how) for how in hows]:
        program.trace(jnp.int32(0), how=how)
    assert traced == hows


def test_a_way_of_decoding_cannot_change():
    for thing, name in ((GREEDY, "mode"), (GREEDY, "fill"), (GREEDY.mode, "depth")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, getattr(thing, name))
