"""What a model makes of a corpus's held-out text, class by class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ds4jax.errors import FileError
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer
from ds4jax.train import data
from ds4jax.train.corpus import Document, tokenise
from ds4jax.train.evaluation import decode, score_copies, score_text

COPIES = "copies"
"""The class of prompts that ask for a copy of held-out text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """How much of each class is measured.

    Attributes:
      rows: tokens of a window, each read from its start.
      batch: windows of a pass.
      windows: of each class, evenly spread; None for all.
      prompts: of each class, to decode from.
      passage: tokens of a prompt, and of what is to be copied; of the copy the prompt
        holds an eighth.
      max_tokens: decoded from each prompt.
      seed: of the prompts.
    """

    rows: int = 1024
    batch: int = 8
    windows: int | None = None
    prompts: int = 8
    passage: int = 128
    max_tokens: int = 112
    seed: int = 0


def evaluate(
    model: Model, tokenizer: Tokenizer, documents: Sequence[Document], scope: Scope
) -> dict[str, dict[str, Any]]:
    """Measure every class and copying, printing a line for each.

    Returns:
      By class the fields of `Score`, `bits_per_byte`, and under `decoded` the
      counters of decoding.

    Raises:
      FileError: if no document is held out.
      ConfigError: if a class has too little text for the prompts.
    """
    held_out = [document for document in documents if document.held_out]
    if not held_out:
        raise FileError("corpus: expected held-out documents, found none")
    results: dict[str, dict[str, Any]] = {}

    def report(name: str, score, prompts):
        counts = decode(model, prompts, scope.max_tokens)
        bits = score.bits_per_byte
        results[name] = {
            **dataclasses.asdict(score), "bits_per_byte": bits, "decoded": counts,
        }  # fmt: skip
        print(
            f"{name}: {bits:.4f} bits per byte, {score.trunk:.4f} nats per token, MTP "
            f"{score.mtp:.4f}; the trunk agrees with {score.accepted:.1%} of drafts "
            f"(ds4's pairing {score.accepted_ds4:.1%}) of {score.tokens} tokens, and "
            f"took {counts['accepted']} of {counts['drafted']} while decoding "
            f"{counts['committed']}",
            flush=True,
        )

    drawn = (scope.prompts, scope.passage)
    for name in dict.fromkeys(document.source_class for document in held_out):
        part = [document for document in held_out if document.source_class == name]
        score = score_text(
            model, tokenizer, tokenise(tokenizer, part), scope.rows, scope.batch,
            scope.windows,
        )  # fmt: skip
        report(name, score, data.text_prompts(part, tokenizer, *drawn, scope.seed))
    copies = data.copy_prompts(
        held_out, tokenizer, *drawn, scope.passage // 8, scope.seed
    )
    # As wide as the text's, so that nothing is compiled for it.
    score = score_copies(model, tokenizer, copies, scope.rows, scope.batch)
    report(COPIES, score, [copy.prompt for copy in copies])
    return results
