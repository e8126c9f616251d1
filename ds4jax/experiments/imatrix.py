"""Measure how large the inputs of every column are, for `ds4jax convert --imatrix`.

The text is cut into sequences of --chunk tokens, each begun with BOS and read as it
stands, by the trunk and by the MTP head in the pairing it was trained in.  Of a corpus
of `ds4jax train` the documents to train on are read, evenly spread.

For every matrix that a plan may quantise, the squared inputs of each column are summed;
an expert has the rows routed to it.  The LM head has the rows of trunk and MTP head.
--out is llama.cpp's importance matrix, in GGUF.

Example:
    ds4jax imatrix --text_file=calibration.txt --out=imatrix.gguf
    ds4jax imatrix --gguf=f32.gguf --mtp=mtp.gguf --corpus=DIR --max_tokens=65536 \
        --out=imatrix.gguf
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from ds4jax import gguf, imatrix
from ds4jax.errors import ConfigError, FileError, TokenError
from ds4jax.experiments import model_flags, token_flags
from ds4jax.files import check_place
from ds4jax.model.importance import collect
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import read_corpus, sample

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
_TEXT_FILE = flags.DEFINE_string("text_file", None, "Text to read.")
_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text to read, in its place.")
_OUT = flags.DEFINE_string("out", None, "File to write, a GGUF.", required=True)
_CHUNK = flags.DEFINE_integer(
    "chunk", 512, "Tokens of a sequence, its BOS included.", lower_bound=2
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Most tokens to read.", lower_bound=1
)


def main(argv: Sequence[str]):
    """Measure the model that the flags name on their text.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or a sequence does not fit in memory.
    """
    del argv
    out = Path(_OUT.value)
    check_place(out)
    chunks = _read_chunks()
    with model_flags.within_memory():
        model = model_flags.load()
        for chunk in chunks:
            token_flags.check_ids(chunk, model.config.vocab)
        bar = tqdm(chunks, unit="chunk", disable=None)
        sums = collect(model, bar, max(map(len, chunks)))
    dataset = _TEXT_FILE.value or _CORPUS.value or "--tokens"
    imatrix.write(out, sums, dataset, len(chunks), _CHUNK.value)
    idle = sum(int((s.counts == 0).sum()) for s in sums.values())
    print(
        f"{out}: {sum(map(len, chunks))} tokens in {len(chunks)} sequences;"
        f" {sum(len(s.counts) for s in sums.values())} matrices, {idle} of them without"
        f" a row; {out.stat().st_size:,} bytes"
    )


_CHARACTERS_PER_TOKEN = 8
"""More than a token has on average, so that a sample holds tokens enough."""


def _read_chunks() -> list[list[int]]:
    """Return the sequences to read: of text with BOS, of ids as they stand."""
    text_file, corpus, most = _TEXT_FILE.value, _CORPUS.value, _MAX_TOKENS.value
    given = (text_file, corpus, token_flags.TOKENS.value)
    if sum(flag is not None for flag in given) != 1:
        raise ConfigError(
            "--text_file, --corpus and --tokens: expected one of them, to read"
        )
    if corpus is not None:
        return _read_corpus(corpus, most)
    if text_file is None:
        return _cut(token_flags.read_ids()[:most])
    tokenizer = _tokenizer()
    ids = tokenizer.encode(token_flags.read_text(text_file))
    if not ids:
        raise TokenError(f"{text_file}: expected text, found none")
    return _cut(ids[:most], tokenizer.bos)


def _read_corpus(folder: str, most: int | None) -> list[list[int]]:
    """Return sequences of all kinds of text, of `most` tokens together."""
    tokenizer = _tokenizer()
    documents = [d for d in read_corpus(folder) if not d.held_out]
    size = sum(len(d.text) for d in documents)
    if most is not None:
        size = min(size, _CHARACTERS_PER_TOKEN * most)
    chunks = [
        chunk
        for ids in tokenizer.encode_batch(list(sample(documents, size)))
        for chunk in _cut(ids, tokenizer.bos)
    ]
    if most is None:
        return chunks
    wanted = -(-most // _CHUNK.value)
    whole = [chunk for chunk in chunks if len(chunk) == _CHUNK.value]
    pool = whole if len(whole) >= wanted else chunks
    at = np.linspace(0, len(pool) - 1, min(wanted, len(pool))).astype(int)
    spread = [pool[i] for i in at]
    left = most - np.cumsum([0, *map(len, spread[:-1])])
    return [chunk[:n] for chunk, n in zip(spread, left, strict=True) if n > 0]


def _tokenizer() -> Tokenizer:
    path = model_flags.trunk_path()
    try:
        return Tokenizer.from_metadata(gguf.read(path).metadata)
    except ConfigError as error:
        raise FileError(f"{path}: {error}; --tokens takes ids") from error


def _cut(ids: list[int], *start: int) -> list[list[int]]:
    """Cut a text into sequences of --chunk tokens, each begun with `start`."""
    size = _CHUNK.value - len(start)
    return [[*start, *ids[at : at + size]] for at in range(0, len(ids), size)]
