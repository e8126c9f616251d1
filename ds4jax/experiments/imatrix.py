"""Measure how large the inputs of every column are, for `ds4jax convert --imatrix`.

The text is cut into sequences of --chunk tokens, each begun with BOS and read as it
stands, by the trunk and by the MTP head in the pairing it was trained in.  For every
matrix that a plan may quantise, the squared inputs of each column are summed; an expert
has the rows routed to it.  The LM head has the rows of trunk and MTP head.  --out is
llama.cpp's importance matrix, in GGUF.

Example:
    ds4jax imatrix --text_file=calibration.txt --out=imatrix.gguf
    ds4jax imatrix --gguf=f32.gguf --mtp=mtp.gguf --text_file=a.txt --out=imatrix.gguf
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ds4jax import gguf, imatrix
from ds4jax.errors import ConfigError, FileError, TokenError
from ds4jax.experiments import model_flags, token_flags
from ds4jax.files import check_place
from ds4jax.model.importance import collect
from ds4jax.tokenizer import Tokenizer

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
_TEXT_FILE = flags.DEFINE_string("text_file", None, "Text to read.")
_OUT = flags.DEFINE_string("out", None, "File to write, a GGUF.", required=True)
_CHUNK = flags.DEFINE_integer(
    "chunk", 512, "Tokens of a sequence, its BOS included.", lower_bound=2
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Most tokens of the text to read.", lower_bound=1
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
    given = _read_given()
    with model_flags.within_memory():
        model = model_flags.load()
        chunks = _cut(given, model.config.vocab)
        bar = tqdm(chunks, unit="chunk", disable=None)
        sums = collect(model, bar, max(map(len, chunks)))
    dataset = _TEXT_FILE.value or "--tokens"
    imatrix.write(out, sums, dataset, len(chunks), _CHUNK.value)
    idle = sum(int((s.counts == 0).sum()) for s in sums.values())
    print(
        f"{out}: {sum(map(len, chunks))} tokens in {len(chunks)} sequences;"
        f" {sum(len(s.counts) for s in sums.values())} matrices, {idle} of them without"
        f" a row; {out.stat().st_size:,} bytes"
    )


def _read_given() -> str | list[int]:
    """Return the text or the ids to read."""
    if (_TEXT_FILE.value is None) == (token_flags.TOKENS.value is None):
        raise ConfigError("--text_file and --tokens: expected one of them, to read")
    if _TEXT_FILE.value is None:
        return token_flags.read_ids()
    return token_flags.read_text(_TEXT_FILE.value)


def _cut(given: str | list[int], vocab: int) -> list[list[int]]:
    """Return the sequences: of a text with BOS, of ids as they stand."""
    start = []
    if isinstance(given, str):
        path = model_flags.trunk_path()
        try:
            tokenizer = Tokenizer.from_metadata(gguf.read(path).metadata)
        except ConfigError as error:
            raise FileError(f"{path}: {error}; --tokens takes ids") from error
        given, start = tokenizer.encode(given), [tokenizer.bos]
        if not given:
            raise TokenError(f"{_TEXT_FILE.value}: expected text, found none")
    token_flags.check_ids(given, vocab)
    given = given[: _MAX_TOKENS.value]
    size = _CHUNK.value - len(start)
    return [start + given[at : at + size] for at in range(0, len(given), size)]
