"""A corpus as a run needs it, vocabulary and tokens, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ds4jax.errors import ConfigError, FileError
from ds4jax.files import replacing
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import Document, Tokens, tokenise, train_tokenizer

VOCABULARY = "tokenizer.json"
TOKENS = "tokens.npz"


def prepare(
    folder: Path, documents: Sequence[Document], vocab: int
) -> tuple[Tokenizer, dict[str, Tokens], str]:
    """Return the vocabulary, the training tokens of each class, and a digest of both.

    Args:
      folder: of the run; keeps them for the next call.
      documents: of which those not held out are used.
      vocab: tokens of the vocabulary.

    Raises:
      ConfigError: if the folder holds those of another corpus or size.
      FileError: if what it holds cannot be read, or nothing can be written.
    """
    train = [document for document in documents if not document.held_out]
    lines = (f"{d.source_class}\0{d.text}" for d in train)
    digest = hashlib.sha256("\0".join((str(vocab), *lines)).encode()).hexdigest()
    vocabulary, store = folder / VOCABULARY, folder / TOKENS
    if vocabulary.exists() and store.exists():
        try:
            metadata = json.loads(vocabulary.read_text())
            tokens = dict(np.load(store))
        except (OSError, ValueError) as error:
            raise FileError(f"{folder}: cannot be read ({error}); delete it") from None
        if metadata.pop("corpus", None) != digest:
            raise ConfigError(
                f"--out={folder}: holds a run on another corpus or vocabulary; give "
                "the same --corpus and --vocab, or another --out"
            )
        return Tokenizer.from_metadata(metadata), tokens, digest
    tokenizer = train_tokenizer(train, vocab)
    tokens = {
        kind: tokenise(tokenizer, [d for d in train if d.source_class == kind])
        for kind in dict.fromkeys(d.source_class for d in train)
    }
    with replacing(store) as part:
        np.savez(part, allow_pickle=False, **tokens)
    with replacing(vocabulary) as part:
        part.write_text(json.dumps({**tokenizer.metadata(), "corpus": digest}))
    return tokenizer, tokens, digest
