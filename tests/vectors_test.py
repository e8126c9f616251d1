"""Vectors: the file, and what the model that ships is told of its own and of others."""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest

from ds4jax import assets, gguf
from ds4jax.decode import driver, vectors
from ds4jax.decode.modes import GREEDY
from ds4jax.decode.vectors import Case, Step, Top
from ds4jax.errors import CapacityError, ConfigError, FileError, TokenError
from ds4jax.model import deepseek
from ds4jax.tokenizer import Tokenizer

PROMPTS = {
    "sea": "The sea was calm; the old man",
    "code": "def add(a, b):\r\n    return",
    "ada-1.b_2": "Chi era «Ada Lovelace»? ",
}
OFFICIAL = """\
# ds4-official-logprob-vectors-v1
# case <id> <ctx> <steps> <prompt-file>

case fact 16384 2 tests/test-vectors/prompts/fact.txt
step 0 416461 1
  top 416461 0
step 1 204c6f76 2
top 204c6f76 -1e-05
# between
top C3A8 -1.25

end
case none 4096 1 fact.txt
step 0 3136 0
end
"""


@pytest.fixture(scope="module")
def model():
    config, trunk = gguf.load_trunk(assets.trunk())
    return deepseek.build(config, trunk)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata(gguf.read(assets.trunk()).metadata)


@pytest.fixture(scope="module")
def cases(model):
    return vectors.capture(model, tokenizer(), PROMPTS, context=256)


def altered(case: Case, index: int, **changes) -> Case:
    """Return `case` with other fields in one step."""
    steps = list(case.steps)
    steps[index] = dataclasses.replace(steps[index], **changes)
    return dataclasses.replace(case, steps=tuple(steps))


def put(folder, text):
    """Write a file of vectors and the prompt that it names."""
    (folder / "prompts").mkdir()
    (folder / "prompts/fact.txt").write_bytes("chi è\r\n".encode())
    path = folder / "official.vec"
    path.write_text(text)
    return path


def test_a_file_of_ds4_is_read(tmp_path):
    (tmp_path / "fact.txt").write_text("other")
    assert vectors.read(put(tmp_path, OFFICIAL)) == (
        Case(
            "fact", 16384, "chi è\r\n",
            (
                Step(b"Ada", (Top(b"Ada", 0.0),)),
                Step(
                    b" Lov",
                    (Top(b" Lov", float(np.float32(-1e-5))), Top("è".encode(), -1.25)),
                ),
            ),
        ),
        Case("none", 4096, "other", (Step(b"16", ()),)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("case fact", "cases fact", "4: expected case <id> <ctx> <steps> <prompt-file>,"
         " found 'cases fact 16384"),
        ("case fact", "case f/../act", "4: expected case "),
        (" 16384 ", " much ", "4: expected case "),
        (" 16384 2", " 16384 -2", "4: expected case "),
        ("16384 2 ", "16384 0 ", "4: expected at least one step, found 'case fact"),
        ("prompts/fact", "prompts/lost", "4: expected a prompt file beside"
         " official.vec, found 'case fact 16384 2 tests/test-vectors/prompts/lost"),
        ("step 0 416461 1", "step 0 41646 1", "5: expected step <index> <selected-hex>"
         " <top-count>, found 'step 0 41646 1'"),
        ("step 1 ", "step 2 ", "7: expected step 1, found 'step 2 204c6f76 2'"),
        ("204c6f76 2", "204c6f76 3", "12: expected top <token-hex> <logprob>,"
         " found 'end'"),
        ("204c6f76 2", "204c6f76 1", "10: expected end, found 'top C3A8 -1.25'"),
        ("16384 2", "16384 3", "12: expected step <index> "),
        ("16384 2", "16384 1", "7: expected end, found 'step 1 "),
        ("-1.25", "-1.25 0", "10: expected top "),
        ("-1.25", "1.25", "10: expected top "),
        ("-1.25", "nan", "10: expected top "),
        ("-1.25", "-1e99", "10: expected top "),
        ("C3A8", "C3G8", "10: expected top "),
        ("3136 0\nend\n", "3136 0\n", "14: expected end, found the end of the file"),
        (OFFICIAL, "# no case\n", "1: expected case <id> <ctx> <steps> <prompt-file>,"
         " found the end of the file"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path, old, new, line):
    (tmp_path / "fact.txt").touch()
    assert old in OFFICIAL
    path = put(tmp_path, OFFICIAL.replace(old, new, 1))
    with pytest.raises(FileError) as caught:
        vectors.read(path)
    assert str(caught.value).startswith(f"{path}:{line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lost.vec", "prompts", "bytes.vec"])
def test_a_file_that_is_no_text_is_named(tmp_path, name):
    put(tmp_path, OFFICIAL)
    (tmp_path / "bytes.vec").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=f"{name}: cannot be read as text: "):
        vectors.read(tmp_path / name)


def test_vectors_survive_the_file(cases, tmp_path):
    path = tmp_path / "own.vec"
    vectors.write(path, cases)
    assert vectors.read(path) == cases
    # Over what is there already, to the byte.
    before = path.read_bytes()
    vectors.write(path, vectors.read(path))
    assert path.read_bytes() == before
    files = sorted(p.name for p in (tmp_path / "prompts").iterdir())
    assert files == ["ada-1.b_2.txt", "code.txt", "sea.txt"]
    assert path.read_text().startswith(
        "# ds4-official-logprob-vectors-v1\n"
        "# case <id> <ctx> <steps> <prompt-file>\n"
        "# step <index> <selected-hex> <top-count>\n"
        "# top <token-hex> <logprob>\n"
        "\n"
        "case sea 256 4 prompts/sea.txt\n"
    )


def test_a_place_that_cannot_be_written_to_is_named(cases, tmp_path):
    with pytest.raises(FileError, match="own.vec: cannot be written: No such file"):
        vectors.write(tmp_path / "lost/own.vec", cases)
    (tmp_path / "prompts").touch()
    with pytest.raises(FileError, match="own.vec: cannot be written: File exists"):
        vectors.write(tmp_path / "own.vec", cases)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts"]


def test_what_is_captured_is_plain_decodings(model, cases):
    """Against one run of the driver, and jax's own logarithms."""
    case = cases[0]
    assert (case.name, case.prompt, case.context) == ("sea", PROMPTS["sea"], 256)
    prompt = tokenizer().chat(case.prompt, think=False)
    start = driver.start(model, prompt, 4, GREEDY)
    logprobs = np.asarray(jax.nn.log_softmax(start.logits[0]))
    tokens = driver.committed(driver.run(model, start, GREEDY))[len(prompt) :]
    said = [tokenizer().token_bytes[t] for t in tokens]
    assert [step.selected for step in case.steps] == said
    best = np.argsort(-logprobs)[:20]
    assert [top.token for top in case.steps[0].top] == [
        tokenizer().token_bytes[i] for i in best
    ]
    found = [top.logprob for top in case.steps[0].top]
    np.testing.assert_allclose(found, logprobs[best], atol=1e-5)
    assert [float(np.float32(x)) for x in found] == found


def test_an_end_of_sequence_token_is_the_last_step(model, cases):
    steps = cases[0].steps
    ends = copy.copy(tokenizer())
    ends.eos = ends.token_bytes.index(steps[1].selected)
    assert steps[0].selected != steps[1].selected
    (case,) = vectors.capture(model, ends, {"sea": PROMPTS["sea"]}, context=256)
    assert case.steps == steps[:2]


def test_a_model_passes_its_own_vectors(model, cases, tmp_path):
    """From the file, and to the last bit."""
    vectors.write(tmp_path / "own.vec", cases)
    found = vectors.compare(model, tokenizer(), vectors.read(tmp_path / "own.vec"))
    assert [c.name for c in found] == list(PROMPTS)
    assert all(c.passes and c.worst == 0 for c in found), found


def test_another_model_is_found_to_be_another(model, cases):
    weights = {
        name: weight * 1.001 if name == "output.weight" else weight
        for name, weight in model.trunk.items()
    }
    other = dataclasses.replace(model, trunk=weights)
    found = vectors.compare(other, tokenizer(), cases)
    assert all(c.passes and 0 < c.worst < 0.1 for c in found), found
    weights["output.weight"] *= np.nan
    broken = dataclasses.replace(model, trunk=weights)
    assert not any(c.passes for c in vectors.compare(broken, tokenizer(), cases))


def test_another_choice_fails_and_ends_the_case(model, cases):
    case = cases[0]
    second = case.steps[1].top[1].token
    wrong = altered(altered(case, 1, selected=second), 2, selected=second)
    (found,) = vectors.compare(model, tokenizer(), [wrong])
    chosen, expected = (t.decode() for t in (case.steps[1].selected, second))
    assert found.failures == (
        f"sea, step 1: expected {expected!r} to be chosen, found {chosen!r}",
    )
    assert not found.passes


def test_a_token_that_is_not_likely_fails(model, cases):
    case = cases[0]
    likely = {top.token for top in case.steps[3].top}
    assert len(likely) == 20
    rare = next(t for t in (b"Q", b"~", b"$") if t not in likely)
    wrong = altered(case, 3, top=(Top(rare, -1.0), *case.steps[3].top))
    (found,) = vectors.compare(model, tokenizer(), [wrong])
    assert found.failures == (
        f"sea, step 3: expected {rare.decode()!r} among the 20 most likely tokens,"
        " found it is not",
    )


@pytest.mark.parametrize(("distance", "passes"), [(3.99, True), (4.01, False)])
@pytest.mark.parametrize("rank", [0, 19])
def test_a_log_probability_too_far_away_fails(model, cases, distance, passes, rank):
    case = cases[1]
    tops = list(case.steps[2].top)
    here = tops[rank].logprob
    tops[rank] = dataclasses.replace(tops[rank], logprob=here - distance)
    (found,) = vectors.compare(model, tokenizer(), [altered(case, 2, top=tuple(tops))])
    assert found.passes == passes
    assert found.worst == pytest.approx(distance)
    token = tops[rank].token.decode()
    assert passes or found.failures == (
        f"code, step 2: expected the log probability of {token!r} within 4 of"
        f" {here - distance:.4g}, found {here:.4g}",
    )


def test_a_case_can_be_left_out(model, cases):
    wrong = altered(cases[0], 0, selected=b"?")
    found = vectors.compare(model, tokenizer(), [wrong, *cases[1:]], skip=["sea"])
    assert [c.name for c in found] == ["code", "ada-1.b_2"]
    assert all(c.passes for c in found)
    with pytest.raises(
        ConfigError, match="skip: expected one of sea, code, .*, found 'see'"
    ):
        vectors.compare(model, tokenizer(), cases, skip=["see"])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "line"),
    [
        ({"a b": "x"}, {}, ConfigError, "prompts: expected names of .*, found 'a b'"),
        ({"": "x"}, {}, ConfigError, "found ''"),
        ({"../a": "x"}, {}, ConfigError, "found '../a'"),
        ({"a": "x"}, {"steps": 0}, ConfigError, r"steps: expected 1\.\.16, found 0"),
        ({"a": "x"}, {"steps": 17}, ConfigError, "found 17"),
        ({"a": "x"}, {"context": 8}, CapacityError,
         "a: expected a context of at least 9 tokens, found 8"),
        ({"a": "\ud800"}, {}, TokenError, "lone surrogate"),
    ],
)  # fmt: skip
def test_mistakes_are_told(model, prompts, options, error, line):
    with pytest.raises(error, match=line) as caught:
        vectors.capture(model, tokenizer(), prompts, **options)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(model, cases):
    tokens = [*tokenizer().tokens, "one more"]
    other = Tokenizer(tokens, tokenizer().merges)
    with pytest.raises(
        ConfigError, match="tokenizer: expected the model's 4096 tokens, found 4097"
    ):
        vectors.compare(model, other, cases)
