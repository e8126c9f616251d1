"""Measure a model on held-out text: bits per byte, and how often its drafts are taken.

For every class of the corpus, and for prompts that ask for a copy, two acceptances are
told.  On the held-out text itself, under both pairings of the MTP head, the share of
the tokens for which its best guess is the trunk's.  While decoding greedily from
prompts, which is a more predictable text, how many of the drafts were committed.

Example:
    ds4jax evaluate --corpus=DIR --windows=32 --report=evaluation.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ds4jax import gguf
from ds4jax.errors import ConfigError
from ds4jax.experiments import model_flags
from ds4jax.files import check_place, replacing
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import read_corpus
from ds4jax.train.report import Scope, evaluate

flags.adopt_module_key_flags(model_flags)
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text.", required=True)
_REPORT = flags.DEFINE_string("report", None, "File to write the figures to, as JSON.")
_WINDOWS = flags.DEFINE_integer(
    "windows", None, "Windows of each class to score; all by default.", lower_bound=1
)
_ROWS = flags.DEFINE_integer("rows", 1024, "Tokens of a window.", lower_bound=8)
_PROMPTS = flags.DEFINE_integer(
    "prompts", 8, "Prompts of each class to decode from.", lower_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 112, "Tokens to decode from each.", lower_bound=1
)


def main(argv: Sequence[str]):
    """Measure the model that the flags name.

    Raises:
      FileError, ConfigError: for a flag or file that cannot be used.
      CapacityError: if the model or a window does not fit in memory.
    """
    del argv
    if _REPORT.value:
        check_place(Path(_REPORT.value))
    if not model_flags.mtp_path():
        raise ConfigError("--mtp: expected an MTP file, whose drafts are measured")
    documents = read_corpus(_CORPUS.value)
    with model_flags.within_memory():
        model = model_flags.load()
        metadata = gguf.read(model_flags.trunk_path()).metadata
        scope = Scope(
            rows=_ROWS.value,
            windows=_WINDOWS.value,
            prompts=_PROMPTS.value,
            passage=_ROWS.value // 8,
            max_tokens=_MAX_TOKENS.value,
        )
        tokenizer = Tokenizer.from_metadata(metadata)
        results = evaluate(model, tokenizer, documents, scope)
    if _REPORT.value:
        with replacing(Path(_REPORT.value)) as part:
            part.write_text(json.dumps(results, indent=2) + "\n")
