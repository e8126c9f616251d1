"""Check that every way of decoding commits what it promises, and leaves what it must.

Each mode, and what ds4's flags and switches make of it, decodes each prompt greedily,
twice.  A run of class G must have the hash of plain decoding, no gap in ds4's oracles,
and, bit for bit, the state that feeding its tokens one a pass gives: the trunk's, the
anchor and the MTP head's rows; and its drafts must be accepted as often as from there
they have to be.  Other classes must stay near.  --logprob_vectors asks the model what
another engine said, too.

The table names the checks of a row that fail, and shows the figure of each.  Status 1
tells that there are any.

Example:
    ds4jax check --quick
    ds4jax check --report=check.md
    ds4jax check --gguf=ds4flash.gguf --logprob_vectors=official.vec --only_vectors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ds4jax import assets
from ds4jax.decode import identity, oracles, vectors
from ds4jax.decode.carry import MAX_DEPTH
from ds4jax.decode.identity import Check, Row
from ds4jax.errors import ConfigError, FileError, TokenError
from ds4jax.experiments import environment, model_flags, token_flags
from ds4jax.files import check_place, replacing

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
_PROMPTS = flags.DEFINE_list(
    "prompts", None, f"Texts that ship to decode after: {','.join(assets.PROMPTS)}."
)
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File of text to decode after.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Tokens to decode: 256, or 129 if quick.",
    lower_bound=1 + oracles.MORE_THAN,
)  # fmt: skip
_MOST_DEPTH = flags.DEFINE_integer(
    "most_depth", None, "Leave deeper modes out: 4, or 1 if quick.",
    lower_bound=1, upper_bound=MAX_DEPTH,
)  # fmt: skip
_QUICK = flags.DEFINE_bool(
    "quick", False, "One prompt, fewer tokens and modes, where flags do not say more."
)
_VECTORS = flags.DEFINE_string(
    "logprob_vectors", None, "File of log-probability vectors, as ds4's official.vec."
)
_ONLY_VECTORS = flags.DEFINE_bool(
    "only_vectors", False, "With --logprob_vectors, decode nothing else."
)
_SKIP = flags.DEFINE_list("skip_vectors", [], "Names of cases to leave out.")
_REPORT = flags.DEFINE_string(
    "report", None, "File to write the table to: .md, or .json."
)


def main(argv: Sequence[str]) -> int:
    """Check the model that the flags name.

    Returns:
      1 if a check fails, else 0.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or a text does not fit.
    """
    del argv
    path = Path(_REPORT.value) if _REPORT.value else None
    if path and path.suffix not in (".md", ".json"):
        raise ConfigError(f"--report: expected a .md or .json file, found {path}")
    if path:
        check_place(path)
    given = _read_prompts()
    if (_ONLY_VECTORS.value or _SKIP.value) and not _VECTORS.value:
        name = "only_vectors" if _ONLY_VECTORS.value else "skip_vectors"
        raise ConfigError(f"--{name}: expected --logprob_vectors with it")
    cases = vectors.read(Path(_VECTORS.value)) if _VECTORS.value else ()
    with model_flags.within_memory():
        rows = _check(given, cases)
    table = markdown(rows)
    print(table)
    failed = [row for row in rows if row.failures]
    verdict = f"{len(rows)} rows, {len(failed)} failed"
    print(verdict)
    if path:
        with replacing(path) as part:
            part.write_text(
                as_json(rows)
                if path.suffix == ".json"
                else f"{table}\n\n{verdict}; {_surroundings()}\n"
            )
    return int(bool(failed))


def _surroundings() -> str:
    return ", ".join(f"{k} {v}" for k, v in environment.describe().items())


def _read_prompts() -> dict[str, str | list[int]]:
    """Return the prompts of the flags, by name, as texts or ids."""
    some = _PROMPTS, _PROMPT_FILE, token_flags.TOKENS
    given = [flag.name for flag in some if flag.value is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name}" for name in given)
        raise ConfigError(f"{names}: expected one of them; leave the others out")
    if token_flags.TOKENS.value is not None:
        return {"tokens": list(token_flags.read_ids())}
    if _PROMPT_FILE.value is not None:
        path = _PROMPT_FILE.value
        return {Path(path).stem: token_flags.read_text(path)}
    names = assets.PROMPTS[:1] if _QUICK.value else assets.PROMPTS
    if _PROMPTS.value is not None:
        names = _PROMPTS.value
    for name in names:
        if name not in assets.PROMPTS:
            raise ConfigError(
                f"--prompts: expected any of {', '.join(assets.PROMPTS)}, found {name}"
            )
    if not names:
        raise ConfigError("--prompts: expected at least one, found none")
    return {name: assets.prompt(name).read_bytes().decode() for name in names}


def _check(
    given: dict[str, str | list[int]], cases: Sequence[vectors.Case]
) -> list[Row]:
    """Return the rows of the table, with a bar of progress on terminals."""
    tokenizer = model_flags.load_tokenizer()
    model = model_flags.load()
    if tokenizer is None and (
        cases or not all(isinstance(prompt, list) for prompt in given.values())
    ):
        raise FileError(
            f"{model_flags.trunk_path()}: has no vocabulary to read text with; give ids"
            " with --tokens"
        )
    rows = []
    if not _ONLY_VECTORS.value:
        prompts = {}
        for name, prompt in given.items():
            if isinstance(prompt, str):
                assert tokenizer
                prompt = [tokenizer.bos, *tokenizer.encode(prompt)]
            elif not prompt:
                raise TokenError("--tokens: expected at least one id, found none")
            token_flags.check_ids(prompt, model.config.vocab)
            prompts[name] = prompt
        most_depth = _MOST_DEPTH.value or (1 if _QUICK.value else MAX_DEPTH)
        tokens = _MAX_TOKENS.value or (1 + oracles.MORE_THAN if _QUICK.value else 256)
        which = identity.ways(bool(model.mtp), most_depth)
        total = len(prompts) * len(which)
        with tqdm(total=total, unit="run", disable=None, file=sys.stderr) as bar:
            rows += identity.check(model, prompts, tokens, which, bar.update)
    if cases:
        assert tokenizer
        found = vectors.compare(model, tokenizer, cases, _SKIP.value)
        rows += [_vector_row(comparison) for comparison in found]
    return rows


def _vector_row(comparison: vectors.Comparison) -> Row:
    figure = "; ".join(comparison.failures) or f"{comparison.worst:.3g}"
    return Row(
        comparison.name, "logprob vectors", "", "",
        {"logprob": Check(figure, comparison.passes)},
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table: what was run, the figures and the verdict."""
    names = list(dict.fromkeys(name for row in rows for name in row.checks))
    cells = [["prompt", "run", "class", "sha256", *names, "verdict"]]
    for row in rows:
        figures = [row.checks[n].figure if n in row.checks else "" for n in names]
        verdict = f"FAIL: {', '.join(row.failures)}" if row.failures else "pass"
        cells.append(
            [row.prompt, row.run, row.output_class, row.digest[:12], *figures, verdict]
        )
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    pad = lambda line: map(str.ljust, line, widths)  # noqa: E731
    return "\n".join(f"| {' | '.join(pad(line))} |" for line in cells)


def as_json(rows: Sequence[Row]) -> str:
    """Return rows, and where they were measured, as JSON."""
    found = [
        {
            "prompt": row.prompt,
            "run": row.run,
            "class": row.output_class,
            "sha256": row.digest,
            "checks": {
                name: {"figure": c.figure, "passes": c.passes}
                for name, c in row.checks.items()
            },
            "passes": not row.failures,
        }
        for row in rows
    ]
    return json.dumps({"environment": environment.describe(), "rows": found}, indent=1)
