"""Log-probability vectors: what one engine said after a prompt, asked of another.

A case is a prompt and, for a few greedy steps, the token that was chosen and the most
likely ones with their log probabilities.  Tokens are told by their bytes, since an
engine behind an API shows no ids.  The file is ds4's `official.vec`, read by line:

    case <id> <ctx> <steps> <prompt-file>
    step <index> <selected-hex> <top-count>
    top <token-hex> <logprob>
    end

`read` takes such a file, `compare` asks a model about it as ds4's `--logprob-vectors`
does, and `capture` and `write` make one from a model, to compare two builds.

Source: antirez/ds4, tests/test-vectors and its reader in `ds4_test.c` (SPECULATION §4).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ds4jax.decode import driver
from ds4jax.decode.carry import with_budget
from ds4jax.decode.modes import GREEDY
from ds4jax.errors import CapacityError, ConfigError, FileError
from ds4jax.files import replacing
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer

LOCAL_TOP = 20
"""Every token of a case must be among so many of the model's most likely ones."""

LOGPROB_TOLERANCE = 4.0
"""ds4's bound on how far log probabilities may be apart; vectors come from weights of
another precision."""

MAX_STEPS = 16
"""Most steps of a case that ds4 reads."""


@dataclasses.dataclass(frozen=True)
class Top:
    """A likely token.

    Attributes:
      token: its bytes.
      logprob: natural logarithm of its probability, at most 0; a float32's value.
    """

    token: bytes
    logprob: float


@dataclasses.dataclass(frozen=True)
class Step:
    """What was said at one position.

    Attributes:
      selected: bytes of the token chosen.
      top: the most likely tokens, as many as are known.
    """

    selected: bytes
    top: tuple[Top, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and what was said after it.

    Attributes:
      name: one word.
      context: most tokens to make room for.
      prompt: the user's text, to be rendered as a chat that does not think.
      steps: at least one.
    """

    name: str
    context: int
    prompt: str
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a model did in one case.

    Attributes:
      name: of the case.
      worst: greatest distance of two log probabilities; 0 if none was compared.
      failures: a line for each condition that does not hold.
    """

    name: str
    worst: float
    failures: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Say whether all of them hold."""
        return not self.failures


def capture(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Mapping[str, str],
    steps: int = 4,
    context: int = 4096,
) -> tuple[Case, ...]:
    """Return what a model says after some prompts.

    Args:
      model: the model; its head is not used.
      tokenizer: of the model's vocabulary.
      prompts: the user's text, by name of the case.
      steps: most tokens of each; an end-of-sequence token is the last.
      context: most tokens to make room for; part of each case, since it decides the
        last bits of the logits.

    Raises:
      ConfigError: for a name that is not one word, a number of steps outside
        1..MAX_STEPS, or a tokenizer of another vocabulary.
      TokenError: if a prompt is not Unicode.
      CapacityError: if prompt and steps exceed the context.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps: expected 1..{MAX_STEPS}, found {steps}")
    for name in prompts:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "prompts: expected names of 1 to 95 letters, digits, dots, dashes or"
                f" underscores, found {name!r}"
            )
    eos, cases = tokenizer.token_bytes[tokenizer.eos], []
    for name, prompt in prompts.items():
        case, said = Case(name, context, prompt, ()), []
        for step in _decode(model, tokenizer, case, steps):
            said.append(step)
            if step.selected == eos:
                break
        cases.append(dataclasses.replace(case, steps=tuple(said)))
    return tuple(cases)


def compare(
    model: Model,
    tokenizer: Tokenizer,
    cases: Sequence[Case],
    skip: Collection[str] = (),
) -> tuple[Comparison, ...]:
    """Ask a model what a file of vectors has the answers to.

    At every step plain decoding must choose the token that was chosen, and find each of
    the likely ones among its own LOCAL_TOP, within LOGPROB_TOLERANCE.  A case ends with
    the first other choice: what comes after it is another text.

    Args:
      model: as `capture`.
      tokenizer: as `capture`.
      cases: of `read` or `capture`.
      skip: names of cases to leave out (ds4 leaves out `long_memory_archive`).

    Raises:
      ConfigError: for a tokenizer of another vocabulary, or if no case has the name of
        one to skip.
      CapacityError: if a prompt and its steps exceed the case's context.
    """
    names = [case.name for case in cases]
    for name in skip:
        if name not in names:
            raise ConfigError(
                f"skip: expected one of {', '.join(names)}, found {name!r}"
            )
    return tuple(
        _compare_case(model, tokenizer, case) for case in cases if case.name not in skip
    )


def _compare_case(model: Model, tokenizer: Tokenizer, case: Case) -> Comparison:
    distances, failures = [], []
    said = _decode(model, tokenizer, case, len(case.steps))
    for index, (step, local) in enumerate(zip(case.steps, said, strict=True)):
        expected = f"{case.name}, step {index}: expected"
        agree = local.selected == step.selected
        if not agree:
            failures.append(
                f"{expected} {_show(step.selected)} to be chosen,"
                f" found {_show(local.selected)}"
            )
        # Of two tokens with the same bytes the likelier one counts, as in ds4.
        likely = {top.token: top.logprob for top in reversed(local.top)}
        for top in step.top:
            if top.token not in likely:
                failures.append(
                    f"{expected} {_show(top.token)} among the {LOCAL_TOP} most likely"
                    " tokens, found it is not"
                )
                continue
            found = likely[top.token]
            distances.append(abs(found - top.logprob))
            if not distances[-1] <= LOGPROB_TOLERANCE:
                failures.append(
                    f"{expected} the log probability of {_show(top.token)} within"
                    f" {LOGPROB_TOLERANCE:g} of {top.logprob:.4g}, found {found:.4g}"
                )
        if not agree:
            break
    worst = float(np.max(distances, initial=0.0))
    return Comparison(case.name, worst, tuple(failures))


def _show(token: bytes) -> str:
    return repr(token.decode(errors="backslashreplace"))


def _decode(
    model: Model, tokenizer: Tokenizer, case: Case, steps: int
) -> Iterator[Step]:
    """Yield what plain decoding says in the first steps after a case's prompt."""
    vocab = model.config.vocab
    if tokenizer.vocab_size != vocab:
        raise ConfigError(
            f"tokenizer: expected the model's {vocab} tokens,"
            f" found {tokenizer.vocab_size}"
        )
    prompt = tokenizer.chat(case.prompt, think=False)
    if len(prompt) + steps > case.context:
        raise CapacityError(
            f"{case.name}: expected a context of at least {len(prompt) + steps} tokens,"
            f" found {case.context}"
        )
    carry = driver.create(model, case.context, GREEDY)
    carry, _ = driver.sync(model, carry, prompt, GREEDY)
    carry = with_budget(carry, steps)
    for _ in range(steps):
        yield _step(np.asarray(carry.logits[0], np.float64), tokenizer)
        carry = driver.run(model, carry, GREEDY, limit=1)


def _step(logits: Float[np.ndarray, "V"], tokenizer: Tokenizer) -> Step:
    """Return the token that greedy decoding chooses, and the LOCAL_TOP likeliest."""
    below = logits - logits.max()
    logprobs = (below - np.log(np.exp(below).sum())).astype(np.float32)
    order = np.argsort(-logits, kind="stable")[:LOCAL_TOP]
    return Step(
        tokenizer.token_bytes[int(np.argmax(logits))],
        tuple(Top(tokenizer.token_bytes[i], float(logprobs[i])) for i in order),
    )


_HEADER = "# ds4-official-logprob-vectors-v1"
_NAME = re.compile(r"[\w.-]{1,95}", re.ASCII)


def _name(word: str) -> str:
    if not _NAME.fullmatch(word):
        raise ValueError
    return word


def _count(word: str) -> int:
    if not word.isdecimal():
        raise ValueError
    return int(word)


def _logprob(word: str) -> float:
    if not -1e38 <= float(word) <= 0:
        raise ValueError
    # As ds4 keeps it, so that what was written reads as what was captured.
    return float(np.float32(word))


_FORMS: dict[str, tuple[str, tuple[Callable[[str], Any], ...]]] = {
    "case": ("case <id> <ctx> <steps> <prompt-file>", (_name, _count, _count, str)),
    "step": (
        "step <index> <selected-hex> <top-count>",
        (_count, bytes.fromhex, _count),
    ),
    "top": ("top <token-hex> <logprob>", (bytes.fromhex, _logprob)),
    "end": ("end", ()),
}
"""How each line is spelled, and what reads its words after the first."""


def write(path: Path, cases: Sequence[Case]):
    """Write vectors to a file, and their prompts to the folder `prompts` beside it.

    Raises:
      FileError: if that cannot be done.
    """
    lines = [_HEADER]
    lines += (f"# {form}" for form, words in _FORMS.values() if words)
    for case in cases:
        file = f"prompts/{case.name}.txt"
        lines += ["", f"case {case.name} {case.context} {len(case.steps)} {file}"]
        for index, step in enumerate(case.steps):
            lines.append(f"step {index} {step.selected.hex()} {len(step.top)}")
            # Nine digits tell any two float32 apart.
            lines += (f"top {t.token.hex()} {t.logprob:.9g}" for t in step.top)
        lines.append("end")
    with replacing(path) as part:
        folder = path.parent / "prompts"
        folder.mkdir(exist_ok=True)
        for case in cases:
            with replacing(folder / f"{case.name}.txt") as prompt:
                prompt.write_bytes(case.prompt.encode())
        part.write_text("\n".join([*lines, ""]))


def read(path: Path) -> tuple[Case, ...]:
    """Read a file of vectors and the prompts it names.

    A prompt is looked for beside the file: ds4's paths begin at its repository's root,
    so the longest end of a path that is a file there is taken.

    Raises:
      FileError: if a file cannot be read, or a line is not what it should be.
    """
    lines = _Lines(path)
    cases = []
    while lines or not cases:
        name, context, count, file = lines.take("case")
        prompt = _read_text(lines.beside(file))
        if not count:
            raise lines.error("at least one step")
        steps = []
        for expected in range(count):
            index, selected, likely = lines.take("step")
            if index != expected:
                raise lines.error(f"step {expected}")
            top = tuple(Top(*lines.take("top")) for _ in range(likely))
            steps.append(Step(selected, top))
        lines.take("end")
        cases.append(Case(name, context, prompt, tuple(steps)))
    return tuple(cases)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as text: {error}") from None


class _Lines:
    """The lines of a file that are neither empty nor comments, taken one by one."""

    def __init__(self, path: Path):
        self._path = path
        lines = enumerate(_read_text(path).split("\n"), 1)
        self._left = [(n, s) for n, s in lines if s.strip() and s.strip()[0] != "#"]
        self._number, self._line = 1, "nothing"

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, kind: str) -> list[Any]:
        """Return what the next line says, which must be of this kind."""
        form, readers = _FORMS[kind]
        if not self._left:
            self._line = "the end of the file"
            raise self.error(form)
        self._number, line = self._left.pop(0)
        self._line = repr(line.strip())
        first, *words = line.split()
        if first != kind or len(words) != len(readers):
            raise self.error(form)
        try:
            return [read(word) for read, word in zip(readers, words, strict=True)]
        except ValueError:
            raise self.error(form) from None

    def beside(self, file: str) -> Path:
        """Return the path of a file that this line names."""
        parts = Path(file).parts
        for skipped in range(len(parts)):
            path = self._path.parent.joinpath(*parts[skipped:])
            if os.path.isfile(path):
                return path
        raise self.error(f"a prompt file beside {self._path.name}")

    def error(self, expected: str) -> FileError:
        """Return the error of the line that was taken last."""
        return FileError(
            f"{self._path}:{self._number}: expected {expected}, found {self._line:.80}"
        )
