"""`ds4jax check`: what it finds in order, which planted fault it names, what it says.

The faults are planted in what the cycles are made of, and only while drafting; plain
decoding, the replay and the oracles stay what they are.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import commands
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import replay as texts
import shipped

from ds4jax import gguf
from ds4jax.decode import cycles, driver, identity, transitions, vectors
from ds4jax.decode.identity import Check, Row, Way
from ds4jax.decode.modes import GREEDY, Mode
from ds4jax.decode.replay import Replay, distance, schedule
from ds4jax.errors import CapacityError
from ds4jax.model import deepseek
from ds4jax.tokenizer import Tokenizer

TOKENS = 129
PLAIN = Way("plain", GREEDY.mode, "G")
CONTINUOUS = Way("continuous", Mode("continuous", 1), "G")
BATCHED = Way("batched", Mode("continuous", 1, "batched"), "M'")
CHAINED = Way("chained", Mode("chained", 1), "G")
CONFIG = models.slim_config()


def check(*ways: Way) -> list[Row]:
    """Return the rows of a model whose head guesses right now and then."""
    prompts = {"text": texts.text(37)}
    return list(identity.check(texts.guessing_model(CONFIG), prompts, TOKENS, ways))


def test_every_way_of_decoding_passes():
    rows = check(PLAIN, CONTINUOUS, BATCHED, CHAINED)
    names = ["in a single pass", "plain", "continuous", "batched", "chained"]
    assert [row.run for row in rows] == names
    assert [row.failures for row in rows] == [[]] * 5, rows
    assert len({row.digest for row in rows}) == 1
    for row in rows[1:]:
        assert list(row.checks) == [
            "tokens", "again", "gap", "diverged", "drafts", "trunk", "anchor", "head",
        ]  # fmt: skip
        assert row.checks["diverged"].passes is None
        exact = row.output_class == "G"
        assert row.checks["tokens"].passes is (True if exact else None)
        assert (row.checks["trunk"].figure == "0") is exact
    # Or the drafts would say nothing of either outcome.
    accepted, _, drafted = rows[2].checks["drafts"].figure.partition(" of ")
    assert 0 < int(accepted) < int(drafted)


def anchor_of_another_row(genuine, carry, out, block, count, decoding):
    """Keep, and believe, the streams of the row before."""
    out = dataclasses.replace(out, streams=jnp.roll(out.streams, 1, axis=1))
    return genuine(carry, out, block, count, decoding)


def draft_of_the_token_before(genuine, model, carry, first, *how):
    """Pair the anchor with its own token, not with the one that follows."""
    at = carry.length[:, None] - 1
    own = jnp.take_along_axis(carry.tokens, at, axis=1)[:, 0]
    return genuine(model, carry, own, *how)


def draft_accepted_one_off(genuine, block, predicted):
    """Take the draft that was rejected, too."""
    return jnp.minimum(genuine(block, predicted) + 1, block.shape[1])


def rejected_row_stays(genuine, carry, out, block, count, decoding):
    """Leave a rejected row, of one layer, where that of the last token was."""
    before = carry.length
    carry = genuine(carry, out, block, count, decoding)
    *layers, last = carry.cache.layers
    slot = (before + count - 1) % last.raw.shape[1]
    row = last.raw[0, (slot[0] + 1) % last.raw.shape[1]]
    stays = last.raw.at[0, slot[0]].set(row)
    raw = jnp.where(count[0] < block.shape[1], stays, last.raw)
    last = dataclasses.replace(last, raw=raw)
    cache = dataclasses.replace(carry.cache, layers=(*layers, last))
    return dataclasses.replace(carry, cache=cache)


PLANTS: list[tuple[Any, str, Callable, set[str]]] = [
    (transitions, "_advance", anchor_of_another_row, {"drafts", "anchor", "head"}),
    (cycles, "draft", draft_of_the_token_before, {"drafts", "head"}),
    (cycles, "agreement", draft_accepted_one_off, {"tokens", "gap"}),
    (transitions, "_advance", rejected_row_stays, {"trunk"}),
]
"""Where a fault is planted, instead of what, which, and what has to fail of it."""


@pytest.mark.parametrize(("place", "name", "fault", "names"), PLANTS)
def test_a_planted_fault_is_named(monkeypatch, place, name, fault, names):
    """Without the fault this is `test_every_way_of_decoding_passes`."""
    genuine, run = getattr(place, name), driver._cycles

    # Another function, since jit remembers the programs of one it has seen.
    @functools.partial(jax.jit, static_argnames="decoding")
    def faulty(model, carry, eos, limit, decoding):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, functools.partial(fault, genuine))
            return cycles.cycles(model, carry, eos, limit, decoding)

    def either(*args, decoding):
        return (faulty if decoding.depth else run)(*args, decoding=decoding)

    monkeypatch.setattr(driver, "_cycles", either)
    single, plain, continuous = check(PLAIN, CONTINUOUS)
    assert not single.failures and not plain.failures
    assert names <= set(continuous.failures), continuous
    if "tokens" not in names and fault is not rejected_row_stays:
        # Neither ds4's oracle nor the hash can see it.
        assert not {"tokens", "again", "gap", "trunk"} & set(continuous.failures)


def test_the_matrix_is_resolved_by_the_precedence_table():
    found = {way.name: way for way in identity.ways(True, 4)}
    assert len(found) == 1 + 4 * 4 + 11
    assert found["ds4 no --mtp"] == Way("ds4 no --mtp", GREEDY.mode, "G", head=False)
    classes = {
        "--mtp_draft=1": "G",
        "--mtp_draft=1, CONTINUOUS": "G",
        "--mtp_draft=2": "M",
        "--mtp_draft=2, STRICT": "G",
        "--mtp_draft=2, CONTINUOUS": "M'",
        "--mtp_draft=2, CONTINUOUS STRICT": "G",
        "--mtp_draft=2, CONTINUOUS SPEC_DISABLE": "G",
        "--mtp_draft=4": "near-greedy",
    }
    assert {n: found[f"ds4 {n}"].output_class for n in classes} == classes
    assert found["ds4 --mtp_draft=1, CONTINUOUS"].mode.kind == "plain"
    assert found["ds4 --mtp_draft=2, CONTINUOUS STRICT"].mode == Mode("chained", 1)
    assert all(way.mode.depth <= 2 for way in identity.ways(True, 2))
    assert [way.name for way in identity.ways(False, 4)] == ["plain"]


def test_what_drafts_must_come_to():
    """Of six tokens, at every other of which two guesses are right; by hand."""
    none = np.zeros(0)
    guesses = np.array([[2, 3, 0, 0], [9, 9, 9, 9]] * 3)
    leads = np.array([5.0, 1, 5, 5, 5, 5])
    text = [7, 1, 2, 3, 2, 3, 2]
    steps = Replay(text, 1, texts.empty().cache, None, none, none, guesses, leads)

    def found(*mode):
        return tuple(schedule(steps, Mode(*mode)).values())

    zeros = [0, 0, 0, 0]
    assert found("plain", 0) == ([6], [0], [6], zeros, zeros)
    # [1 2 3], [2] and a miss, [3 2] and no room for a second draft.
    assert found("continuous", 2) == ([3], [0], [6], [3, 2, 0, 0], [2, 1, 0, 0])
    assert found("chained", 1) == ([6], [3], [6], [2, 0, 0, 0], zeros)
    gated = found("chained", 1, "batched", 2.0)
    assert gated == ([6], [3], [6], [1, 0, 0, 0], zeros)


def test_a_distance_is_zero_of_equal_bits_only():
    one = jnp.array([3.0, 4.0])
    assert distance(one, one) == 0
    assert distance(jnp.array([3.0, 9.0]), one) == 1
    assert distance(jnp.nextafter(one, one + 1), one) > 0
    assert distance(one * jnp.nan, one) == float("inf")


def test_too_few_tokens_are_told():
    with pytest.raises(CapacityError, match="max_tokens: expected more than 128, as"):
        list(identity.check(texts.guessing_model(CONFIG), {"a": [1]}, 128, [PLAIN]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    trunk, mtp = shipped.write_pair(tmp_path_factory.mktemp("pair"))
    return trunk, mtp


@pytest.fixture(scope="module")
def command():
    with commands.command("check") as command:
        yield command


@pytest.fixture
def run(command, files, tmp_path):
    return functools.partial(command.run, tmp_path, f"--gguf={files[0]}")


def own_vectors(trunk, path):
    """Write what a trunk itself says of a text."""
    config, weights = gguf.load_trunk(trunk)
    model = deepseek.build(config, weights)
    tokenizer = Tokenizer.from_metadata(gguf.read(trunk).metadata)
    cases = vectors.capture(model, tokenizer, {"sea": "The sea"}, 2, context=256)
    vectors.write(path, cases)
    return cases


def test_vectors_decide_the_status(run, files, tmp_path):
    (case,) = own_vectors(files[0], tmp_path / "own.vec")
    words = "--logprob_vectors=own.vec", "--only_vectors"
    status, out, err = run(*words, "--report=found.md")
    assert status == 0, err
    assert out.endswith("\n1 rows, 0 failed\n") and " sea " in out
    assert (tmp_path / "found.md").read_text().startswith(out[:100])
    step = dataclasses.replace(case.steps[0], selected=b"?")
    wrong = dataclasses.replace(case, steps=(step, *case.steps[1:]))
    vectors.write(tmp_path / "own.vec", [wrong])
    status, out, err = run(*words, "--report=found.json")
    assert status == 1, err
    assert "FAIL: logprob" in out and "expected '?' to be chosen" in out
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (row["prompt"], row["passes"]) == ("sea", False)
    status, out, err = run(*words, "--skip_vectors=see")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_trunk_alone_decodes_plainly(run):
    status, out, err = run("--tokens=1,2,3", "--quick")
    assert status == 0, out + err
    lines = out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:-1]] == [
        "in a single pass", "plain",
    ]  # fmt: skip
    assert lines[-1] == "2 rows, 0 failed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens=1", "--prompts=copy"], "--prompts and --tokens: expected one of"),
        (
            ["--prompts=novel"],
            "--prompts: expected any of copy, technical, prose, foun",
        ),
        (["--prompts="], "--prompts: expected at least one, found none"),
        (["--prompt_file=none.txt"], "none.txt: cannot be read as text"),
        (["--max_tokens=128"], "--max_tokens=128: 128 is not"),
        (["--most_depth=5"], "--most_depth=5: 5 is not"),
        (["--only_vectors"], "--only_vectors: expected --logprob_vectors with it"),
        (["--skip_vectors=a"], "--skip_vectors: expected --logprob_vectors with it"),
        (["--logprob_vectors=none.vec"], "none.vec: cannot be read as text"),
        (["--report=a.txt"], "--report: expected a .md or .json file, found a.txt"),
        (["--report=no/a.md"], "no/a.md: cannot be written: No such file"),
        (["--tokens=280"], "--tokens: expected ids in 0..279, found 280"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_shows_what_decided():
    from ds4jax.experiments.check import markdown

    good = Row("a", "plain", "G", "0" * 64, {"gap": Check("0", True)})
    bad = Row("a", "other", "M", "1" * 64, {"gap": Check("3", False)})
    *_, one, two = markdown([good, bad]).splitlines()
    assert one.endswith("| pass      |") and two.endswith("| FAIL: gap |")
    assert "| 3   |" in two and "| 111111111111 |" in two
