"""From a folder of text to a vocabulary and a flat array of tokens."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import UInt16, UInt32
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from ds4jax.errors import ConfigError, FileError
from ds4jax.tokenizer import DSML, REQUIRED_SPECIALS, Tokenizer, pre_tokenizer

ABOUT = ("readme", "sources", "license", "licence", "notice")
"""Stems, in any case, of files that describe a corpus and are no part of it."""

LONGEST_DOCUMENT = 100_000
"""Characters after which a plain file is cut, at a line end, into another document."""

HELD_OUT_EVERY = 50
"""Which document is held out, counting, of a corpus that holds out none itself."""

TOKENIZER_SAMPLE = 24_000_000
"""Characters of text that the vocabulary is learned from."""

Tokens = UInt16[np.ndarray, " n"] | UInt32[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
      text: not blank.
      source_class: the kind of text, such as prose or code.
      held_out: for measuring only, never trained on.
      source, licence: as the file gives them, or empty.
    """

    text: str
    source_class: str
    held_out: bool = False
    source: str = ""
    licence: str = ""


def read_corpus(folder: str | Path) -> list[Document]:
    """Read every text below `folder`, in the order of the paths.

    A `.jsonl` file holds one document per line (keys `text` and perhaps `source` and
    `licence`); any other file is one document, or several where it is long.  Either may
    be compressed (`.gz`).  A document's class is the first part of its path, up to the
    first dot: `code.jsonl.gz` and `code/a/b.py` are both `code`.  Files named
    `*.heldout.*` or in a folder `heldout` are held out; if there are none, every 50th
    document is (of fewer, the last).  Hidden files and the corpus's own README,
    SOURCES, LICENSE and NOTICE are passed over.

    Raises:
      FileError: naming file and line, for a file that cannot be read, is not UTF-8 or
        not JSON, or a folder without at least two documents.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder of text files, found none")
    documents: list[Document] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not (
            any(part.startswith(".") for part in parts)
            or path.name.split(".")[0].lower() in ABOUT
        ):
            documents += _read_file(path, parts)
    if len(documents) < 2:
        raise FileError(
            f"{folder}: expected at least 2 documents, one of them to hold out, found "
            f"{len(documents)}; add text files"
        )
    if not any(document.held_out for document in documents):
        first = min(HELD_OUT_EVERY, len(documents)) - 1
        for i in range(first, len(documents), HELD_OUT_EVERY):
            documents[i] = dataclasses.replace(documents[i], held_out=True)
    return documents


def _read_file(path: Path, parts: tuple[str, ...]) -> Iterator[Document]:
    held_out = "heldout" in parts[:-1] or ".heldout." in path.name
    inside = [part for part in parts if part != "heldout"]
    source_class = inside[0].split(".")[0]
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {error}") from None
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        records = _records(path, data)
    else:
        text = _decode(path, data, line=1)
        records = ({"text": piece, "source": str(path)} for piece in _cut(text))
    for record in records:
        if record["text"].strip():
            yield Document(
                text=record["text"],
                source_class=source_class,
                held_out=held_out,
                source=str(record.get("source", "")),
                licence=str(record.get("licence", "")),
            )


def _decode(path: Path, data: bytes, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise FileError(
            f"{path}:{line}: expected UTF-8 text, found byte "
            f"0x{data[error.start]:02x}; convert the file or take it out of the folder"
        ) from None


def _records(path: Path, data: bytes) -> Iterator[dict]:
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            record = json.loads(_decode(path, raw, line))
        except json.JSONDecodeError as error:
            raise FileError(f"{path}:{line}: not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise FileError(
                f"{path}:{line}: expected an object with a string 'text', found "
                f"{raw.decode()!r:.60}"
            )
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in set(text)):
            raise FileError(f"{path}:{line}: 'text' holds a lone surrogate")
        yield record


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_DOCUMENT:
        limit = start + LONGEST_DOCUMENT
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` tokens.

    The specials come first, then all 256 bytes, then what byte-pair merging finds in an
    even sample of the documents.  The same documents always give the same vocabulary.

    Raises:
      ConfigError: if `vocab_size` is below 263 or the text is too little for it.
    """
    specials = [*REQUIRED_SPECIALS, DSML]
    if vocab_size < len(specials) + 256:
        raise ConfigError(
            f"vocab_size: expected at least {len(specials) + 256} (the specials and "
            f"256 bytes), found {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample(documents, TOKENIZER_SAMPLE), trainer)
    vocab = backend.get_vocab()
    if len(vocab) != vocab_size:
        raise ConfigError(
            f"vocab_size: the text yields only {len(vocab)} tokens, expected "
            f"{vocab_size}; add text or ask for fewer"
        )
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    return Tokenizer(tokens, [" ".join(parts) for parts in merges])


def sample(documents: Sequence[Document], characters: int) -> Iterator[str]:
    """Yield whole texts, evenly spread, of about so many characters."""
    share = min(1.0, characters / sum(len(d.text) for d in documents))
    passed = kept = 0
    for document in documents:
        if kept <= share * passed:
            kept += len(document.text)
            yield document.text
        passed += len(document.text)


def tokenise(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tokens:
    """Return BOS, text and EOS of every document, end to end.

    uint16 if the vocabulary fits, else uint32.  Shows its progress on a terminal.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts = [np.zeros(0, dtype)]
    group = 64  # documents encoded at once, on all cores
    with tqdm(total=len(documents), desc="tokenise", unit="doc", disable=None) as bar:
        for i in range(0, len(documents), group):
            texts = [document.text for document in documents[i : i + group]]
            for ids in tokenizer.encode_batch(texts):
                parts.append(np.array([tokenizer.bos, *ids, tokenizer.eos], dtype))
            bar.update(len(texts))
    return np.concatenate(parts)
