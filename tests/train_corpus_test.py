"""Reading a folder of text, learning its vocabulary, and the flat array of tokens."""

import gzip
import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from ds4jax.errors import ConfigError, FileError
from ds4jax.tokenizer import DSML, REQUIRED_SPECIALS, Tokenizer
from ds4jax.train import corpus
from ds4jax.train.corpus import Document

WORDS = "the quick brown fox jumps over a lazy dog while 1234 stars shine".split()


TRUNCATED = gzip.compress(b"abc" * 99, mtime=0)[:-9]


def prose(seed, words=4000):
    chosen = np.random.default_rng(seed).choice(WORDS, words)
    return " ".join(chosen).replace(" a ", "\na é漢 ")


DOCUMENTS = [Document(prose(i), "prose") for i in range(8)]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_read_corpus(tmp_path):
    (tmp_path / "code.jsonl").write_bytes(
        jsonl({"text": "a\n", "source": "x", "licence": "MIT"}, {"text": " \n"}) + b"\n"
    )
    (tmp_path / "prose.heldout.jsonl.gz").write_bytes(
        gzip.compress(jsonl({"text": "b"}))
    )
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "deep" / "m.py").write_text("é = 1\n")
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "notes.md").write_text("c")
    (tmp_path / "SOURCES.md").write_text("about")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    found = corpus.read_corpus(tmp_path)
    assert found == [
        Document("é = 1\n", "code", False, str(tmp_path / "code" / "deep" / "m.py")),
        Document("a\n", "code", False, "x", "MIT"),
        Document("c", "notes", True, str(tmp_path / "heldout" / "notes.md")),
        Document("b", "prose", True),
    ]


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, [1]), (49, [48]), (50, [49]), (120, [49, 99])]
)
def test_holds_out_when_the_corpus_does_not(tmp_path, count, held_out):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": str(i)} for i in range(count))))
    found = corpus.read_corpus(tmp_path)
    assert [i for i, document in enumerate(found) if document.held_out] == held_out


def test_long_files_are_cut_at_lines(tmp_path):
    text = prose(0, 100_000)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    found = [document.text for document in corpus.read_corpus(tmp_path)]
    assert "".join(found) == text
    assert len(found) == -(-len(text) // corpus.LONGEST_DOCUMENT)
    assert all(len(piece) <= corpus.LONGEST_DOCUMENT for piece in found)
    assert all(piece.endswith("\n") for piece in found[:-1])


def test_a_line_longer_than_a_document_is_cut_anywhere(tmp_path):
    text = "x" * (2 * corpus.LONGEST_DOCUMENT + 1)
    (tmp_path / "line.txt").write_text(text)
    found = [document.text for document in corpus.read_corpus(tmp_path)]
    assert "".join(found) == text and len(found) == 3


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt:2: .*0xff"),
        (
            "a.jsonl",
            jsonl({"text": "a"}) + b'{"text": "\xe9"}\n',
            r"a\.jsonl:2: .*0xe9",
        ),
        ("a.jsonl", b"\n{\n", r"a\.jsonl:2: not JSON"),
        ("a.jsonl", jsonl({"text": "a"}, ["b"]), r"a\.jsonl:2: .*'text'"),
        ("a.jsonl", jsonl({"text": 3}), r"a\.jsonl:1: .*'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .*surrogate"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        (
            "a.txt.gz",
            gzip.compress(b"abc" * 99, mtime=0)[:-9],
            r"a\.txt\.gz: cannot be read",
        ),
        ("a.txt", b" \n", "at least 2 documents.*found 0"),
        ("a.txt", b"only one", "at least 2 documents.*found 1"),
    ],
)
def test_refused_files(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=named) as caught:
        corpus.read_corpus(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        corpus.read_corpus(tmp_path / "nowhere")


def test_vocabulary_has_the_size_asked_for():
    tokenizer = corpus.train_tokenizer(DOCUMENTS, 300)
    assert tokenizer.vocab_size == len(set(tokenizer.tokens)) == 300
    assert tokenizer.tokens[:7] == (*REQUIRED_SPECIALS, DSML)
    assert set(tokenizer.tokens[7:263]) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(tokenizer.merges) == 300 - 263
    for text in (DOCUMENTS[0].text, "unseen: \x00😀ß\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" quick brown")) == 2
    # "\na" was frequent, but the splitter never lets a merge cross a line's end.
    assert not any("Ċa" in token for token in tokenizer.tokens)


def test_vocabulary_is_deterministic_and_survives_metadata():
    tokenizer = corpus.train_tokenizer(DOCUMENTS, 300)
    again = corpus.train_tokenizer(list(DOCUMENTS), 300)
    assert (again.tokens, again.merges) == (tokenizer.tokens, tokenizer.merges)
    read = Tokenizer.from_metadata(tokenizer.metadata())
    assert read.encode(DOCUMENTS[0].text) == tokenizer.encode(DOCUMENTS[0].text)


def test_vocabulary_is_learned_from_an_even_sample(monkeypatch):
    words = ["zebra", "camel", "otter", "moose", "whale", "tiger"]
    documents = [Document(f" {word}" * 1000, "p") for word in words]
    monkeypatch.setattr(corpus, "TOKENIZER_SAMPLE", 3 * len(documents[0].text))
    tokens = corpus.train_tokenizer(documents, 263 + 15).tokens
    assert [f"Ġ{word}" in tokens for word in words] == [True, False] * 3
    # However large one document is, it is learned from.
    monkeypatch.setattr(corpus, "TOKENIZER_SAMPLE", 10)
    assert "Ġzebra" in corpus.train_tokenizer(documents[:1], 263 + 5).tokens


@pytest.mark.parametrize(
    ("size", "named"), [(262, "at least 263.*found 262"), (100_000, "yields only")]
)
def test_impossible_vocabulary_sizes(size, named):
    with pytest.raises(ConfigError, match=f"vocab_size: .*{named}"):
        corpus.train_tokenizer(DOCUMENTS, size)


def test_tokenise():
    tokenizer = corpus.train_tokenizer(DOCUMENTS, 300)
    documents = [Document(f"<｜User｜> n {i}", "p") for i in range(150)]
    expected = [
        [tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos]
        for document in documents
    ]
    tokens = corpus.tokenise(tokenizer, documents)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, sum(expected, []))
    assert corpus.tokenise(tokenizer, []).shape == (0,)


def test_tokenise_a_large_vocabulary():
    small = corpus.train_tokenizer(DOCUMENTS, 263)
    large = Tokenizer([*small.tokens, *(f"\u4e00{i}" for i in range(1 << 16))], [])
    assert corpus.tokenise(large, DOCUMENTS[:1]).dtype == np.uint32
