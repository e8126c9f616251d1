"""DeepSeek's byte-level BPE, and how a conversation becomes tokens.

The vocabulary comes from GGUF metadata (`tokenizer.ggml.tokens`, `.merges`) and the
work is done by the `tokenizers` library.  Text is cut by three regexes in sequence
(llama.cpp's `joyai-llm`, the same as `deepseek-v3`), then mapped byte by byte to
GPT-2's printable alphabet, then merged.

Two back ends share one BPE model.  The first has no added tokens, so text that spells
`<｜User｜>` becomes ordinary tokens and cannot forge a turn; the second knows the
special strings.  `encode(text)` uses the first, `encode(text, specials=True)` the
second.

Source: ds4 `ds4.c` (specials by string, chat rendering); llama.cpp `llama-vocab.cpp`
(regexes).  Where ds4's hand-written splitter differs from the regexes (non-ASCII
punctuation and digits), the regexes are followed.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from ds4jax.errors import ConfigError, TokenError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

REQUIRED_SPECIALS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)
"""The specials without which ds4 refuses a file; `DSML` (tool calls) is optional."""

SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
"""Oniguruma syntax; each cuts the pieces that the one before it left."""


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Return the splitter: digits in threes, CJK runs, words, then bytes."""
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes stand for themselves, others follow."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {
        chr(256 + n): b for n, b in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_of_char()


def _token_bytes(token: str) -> bytes:
    """Return what a token prints; a special, outside the alphabet, prints itself."""
    if all(char in _BYTE_OF_CHAR for char in token):
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    return token.encode()


def _string_list(metadata: Mapping[str, Any], key: str) -> list[str]:
    if key not in metadata:
        raise ConfigError(f"{key}: required metadata key is missing")
    value = metadata[key]
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ConfigError(f"{key}: expected a list of strings, found {value!r:.60}")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise ConfigError(f"{key}[{index}]: expected a string, found {item!r:.60}")
    return list(value)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      tokens: the vocabulary, in GPT-2's printable alphabet; index = id.
      merges: `"left right"`, most important first.
      specials: id of every special string that the vocabulary holds.
      bos, eos, user, assistant, think, end_think: ids of the required specials.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]):
        """Build from a vocabulary and its merges.

        Raises:
          ConfigError: for a duplicate token, a missing special or byte, or a merge
            whose parts or product are not in the vocabulary.
        """
        self.tokens = tuple(tokens)
        self.merges = tuple(merges)
        vocab = _vocabulary(self.tokens)
        pairs = [_merge(vocab, index, text) for index, text in enumerate(self.merges)]
        self.specials = {s: vocab[s] for s in (*REQUIRED_SPECIALS, DSML) if s in vocab}
        self.bos = vocab[BOS]
        self.eos = vocab[EOS]
        self.user = vocab[USER]
        self.assistant = vocab[ASSISTANT]
        self.think = vocab[THINK]
        self.end_think = vocab[END_THINK]
        self.token_bytes = tuple(_token_bytes(token) for token in self.tokens)

        model = models.BPE(vocab=vocab, merges=pairs)
        self._plain, self._with_specials = (
            tokenizers.Tokenizer(model) for _ in range(2)
        )
        for backend in (self._plain, self._with_specials):
            backend.pre_tokenizer = pre_tokenizer()  # pyright: ignore
        self._with_specials.add_special_tokens(
            [AddedToken(s, special=True, normalized=False) for s in self.specials]
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from the metadata of a GGUF file.

        Only `tokenizer.ggml.tokens` and `.merges` are read: like ds4, the specials are
        found by their strings and not by the file's ids.

        Raises:
          ConfigError: for a missing key, an entry that is not a string, or as
            `__init__`.
        """
        return cls(
            _string_list(metadata, "tokenizer.ggml.tokens"),
            _string_list(metadata, "tokenizer.ggml.merges"),
        )

    def metadata(self) -> dict[str, Any]:
        """Return the metadata from which `from_metadata` builds this tokenizer."""
        special_ids = set(self.specials.values())
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "joyai-llm",
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": [
                int(TokenType.CONTROL if i in special_ids else TokenType.NORMAL)
                for i in range(self.vocab_size)
            ],
            "tokenizer.ggml.merges": list(self.merges),
            "tokenizer.ggml.bos_token_id": self.bos,
            "tokenizer.ggml.eos_token_id": self.eos,
        }

    @property
    def vocab_size(self) -> int:
        """Return V."""
        return len(self.tokens)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Return the ids of `text`, with no BOS.

        Args:
          text: any text.
          specials: turn special strings within `text` into their ids.  Off, as for
            everything a user typed, they are spelled with ordinary tokens.

        Raises:
          TokenError: if `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        _check_utf8(text)
        return (self._with_specials if specials else self._plain).encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` of each text, computed on all cores."""
        for text in texts:
            _check_utf8(text)
        return [e.ids for e in self._plain.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Return the text of `ids` (integers of any kind), specials included.

        Bytes that are not UTF-8 (a character cut in two) read as U+FFFD.

        Raises:
          TokenError: for an id outside the vocabulary.
        """
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def stream(self) -> TokenStream:
        """Return a decoder that takes the ids one by one."""
        return TokenStream(self)

    def _bytes(self, token: SupportsIndex) -> bytes:
        token = operator.index(token)
        # Checked, since a negative id would silently count from the end.
        if not 0 <= token < self.vocab_size:
            raise TokenError(
                f"token id: expected 0..{self.vocab_size - 1}, found {token}"
            )
        return self.token_bytes[token]

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        system: str | None = None,
        *,
        think: bool,
    ) -> list[int]:
        """Render a conversation up to where the assistant begins to speak.

            BOS [system] <｜User｜>prompt<｜Assistant｜>answer EOS
            <｜User｜>prompt<｜Assistant｜> and then <think> or </think>

        An earlier answer without reasoning is preceded by `</think>`; one that starts
        with `<think>` or `</think>` is kept whole, its markers as special tokens.  An
        EOS follows every earlier answer, as the official renderer has it and as the
        model generated it; ds4's low-level helper leaves it out.  Unlike the official
        renderer, old reasoning is not dropped, so a continued conversation extends the
        tokens already in the cache.  No text of a message can forge a special token.

        Args:
          messages: a prompt, or turns with `role` (user, assistant) and `content`; the
            last is the user's.
          system: text before the first turn, which has no marker of its own.
          think: let the assistant reason first.

        Raises:
          ConfigError: for another role, a missing key, or a last turn that is not the
            user's.
          TokenError: as `encode`.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages or messages[-1].get("role") != "user":
            raise ConfigError("messages: expected the last one to have role 'user'")
        ids = [self.bos, *self.encode(system or "")]
        for index, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, str):
                raise ConfigError(
                    f"messages[{index}].content: expected text, found {content!r:.60}"
                )
            match message.get("role"):
                case "user":
                    ids += [self.user, *self.encode(content)]
                case "assistant":
                    ids += [self.assistant, *self._answer(content), self.eos]
                case role:
                    raise ConfigError(
                        f"messages[{index}].role: expected 'user' or 'assistant', "
                        f"found {role!r:.60}"
                    )
        return [*ids, self.assistant, self.think if think else self.end_think]

    def _answer(self, content: str) -> list[int]:
        if not content.startswith(THINK):
            answer = self.encode(content.removeprefix(END_THINK))
            return [self.end_think, *answer]
        reasoning, closed, answer = content.removeprefix(THINK).partition(END_THINK)
        ids = [self.think, *self.encode(reasoning)]
        return [*ids, self.end_think, *self.encode(answer)] if closed else ids


class TokenStream:
    """Decodes ids as they come; the pieces joined are `decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer):
        """Start an empty text."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: SupportsIndex) -> str:
        """Return the characters that `token` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer._bytes(token))

    def flush(self) -> str:
        """Return U+FFFD if a character was left unfinished, and start anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _check_utf8(text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenError(
            f"text: character {error.start} is the lone surrogate "
            f"{text[error.start]!r}, which UTF-8 cannot express"
        ) from None


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Return the id of each token, having checked that text can be expressed."""
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if vocab.setdefault(token, index) != index:
            raise ConfigError(
                f"tokenizer.ggml.tokens[{index}]: {token!r} is already token "
                f"{vocab[token]}; expected each token once"
            )
    for special in REQUIRED_SPECIALS:
        if special not in vocab:
            raise ConfigError(
                f"tokenizer.ggml.tokens: required token is missing: {special}"
            )
    # The library drops a byte it has no token for, and the text would not survive.
    for char, byte in _BYTE_OF_CHAR.items():
        if char not in vocab:
            raise ConfigError(
                f"tokenizer.ggml.tokens: no token for byte 0x{byte:02x} ({char!r})"
            )
    return vocab


def _merge(vocab: Mapping[str, int], index: int, text: str) -> tuple[str, str]:
    """Return the two parts of merge number `index`."""
    left, _, right = text.partition(" ")
    if not (left and right) or " " in right:
        raise ConfigError(
            f"tokenizer.ggml.merges[{index}]: expected two tokens with one space "
            f"between them, found {text!r:.60}"
        )
    for token in (left, right, left + right):
        if token not in vocab:
            raise ConfigError(
                f"tokenizer.ggml.merges[{index}]: {text!r} needs {token!r}, which is "
                f"not in tokenizer.ggml.tokens"
            )
    return left, right
