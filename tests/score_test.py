"""`ds4jax score`: its arrays are the library's, and a mistake leaves nothing behind.

The texts are longer than a chunk.  In the shorter one the last chunk has a single
token, of which the trained pairing makes no pair.
"""

import functools
import re
from types import SimpleNamespace

import commands
import models
import numpy as np
import pytest

from ds4jax import gguf, schema
from ds4jax.config import QuantPlan
from ds4jax.decode.modes import PREFILL_CHUNK
from ds4jax.errors import FileError
from ds4jax.files import replacing

ATOL = 2e-5
"""Chunks over a ring sum in another order than one pass; logits are of deviation 1."""
ROUNDING = 1e-3
"""What simulated rounding moves at least; an f32 sum in another order cannot."""
CONFIG = models.micro_config(head_dim=80, index_dim=32)  # widths that ds4 can round
TOKENS = models.text(CONFIG, PREFILL_CHUNK + 20)
SHORTER = PREFILL_CHUNK + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model, one that ds4 cannot round, and two texts."""
    folder = tmp_path_factory.mktemp("score")
    for name, config, specs, seed in (
        ("trunk", CONFIG, schema.trunk, 0),
        ("mtp", CONFIG, schema.mtp, 1),
        ("narrow", models.micro_config(), schema.trunk, 0),
    ):
        weights = models.lively_weights(specs(config), config, seed)
        plan = QuantPlan.named("f32")
        gguf.write_model(folder / f"{name}.gguf", config, weights, plan)
    for name, ids in (("ids", TOKENS[0]), ("shorter", TOKENS[0, :SHORTER])):
        (folder / f"{name}.txt").write_text("\n".join(map(str, ids)))
    return folder


@pytest.fixture(scope="module")
def score(folder):
    """Return a function that runs the command in `folder`."""
    with commands.command("score") as command:
        yield functools.partial(command.run, folder)


@pytest.fixture(scope="module")
def arrays(folder, score):
    """Return a function that gives (arrays, summary) of a run that succeeds."""

    def run(out, *words):
        before = set(folder.iterdir())
        status, summary, err = score(f"--out={out}", "--gguf=trunk.gguf", *words)
        assert (status, err) == (0, "")
        assert set(folder.iterdir()) - before == {folder / out}
        with np.load(folder / out) as stored:
            return dict(stored), summary

    return run


@pytest.fixture(scope="module")
def trained(arrays):
    return arrays("exactly.this", "--mtp=mtp.gguf", "--tokens=@shorter.txt")


@pytest.fixture(scope="module")
def paired_as_ds4(arrays):
    words = "--mtp=mtp.gguf", "--tokens=@ids.txt", "--pairing=ds4"
    return arrays("ds4.npz", *words)[0]


@pytest.fixture(scope="module")
def rounded(arrays):
    ids = ",".join(map(str, TOKENS[0, :SHORTER]))
    return arrays("rounded.npz", f"--tokens={ids}", "--kv_rounding=ds4")[0]


@pytest.fixture(scope="module")
def library():
    """Return one pass of the library over the text, without a cache."""
    model = models.lively(CONFIG)
    out = models.trunk(model, TOKENS)

    def head(tokens):
        return np.asarray(models.mtp(model, tokens, out.streams).logits[0])

    return SimpleNamespace(
        logits=np.asarray(out.logits[0]),
        streams=np.asarray(out.streams[0]),
        trained=head(np.roll(TOKENS, -1, axis=1))[:-1],
        ds4=head(TOKENS),
    )


def close(actual, expected):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


def test_trunk_and_head_of_the_trained_pairing(trained, library):
    found, _ = trained
    assert sorted(found) == ["logits", "mtp_logits", "streams"]
    close(found["logits"], library.logits[:SHORTER])
    close(found["streams"], library.streams[:SHORTER])
    close(found["mtp_logits"], library.trained[: SHORTER - 1])


def test_trunk_and_head_of_ds4s_pairing(paired_as_ds4, library):
    close(paired_as_ds4["logits"], library.logits)
    close(paired_as_ds4["streams"], library.streams)
    close(paired_as_ds4["mtp_logits"], library.ds4)


def test_rounding_changes_the_logits_and_no_head_gives_none(rounded, library):
    assert sorted(rounded) == ["logits", "streams"]
    assert rounded["logits"].shape == (SHORTER, CONFIG.vocab)
    assert np.abs(rounded["logits"] - library.logits[:SHORTER]).max() > ROUNDING


def test_the_summary_is_one_line_and_tells_the_nats(trained, folder):
    found, summary = trained
    logits = found["logits"][:-1].astype(np.float64)
    right = logits[np.arange(SHORTER - 1), TOKENS[0, 1:SHORTER]]
    nats = np.mean(np.log(np.exp(logits).sum(-1)) - right)
    told = re.fullmatch(
        rf"exactly\.this: {SHORTER} tokens, ([\d.]+) nats per token;"
        rf" logits {SHORTER}x96, streams {SHORTER}x4x64, mtp_logits {SHORTER - 1}x96;"
        r" ([\d,]+) bytes\n",
        summary,
    )
    assert told, summary
    assert float(told[1]) == pytest.approx(nats, abs=1e-4)
    assert int(told[2].replace(",", "")) == (folder / "exactly.this").stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--out=x.npz", "--tokens="],
            "--tokens: expected at least one id, found none",
        ),
        (["--out=x.npz", "--tokens=1,x"], "--tokens: expected ids such as 1,2,3"),
        (["--out=x.npz", "--tokens=1,96"], "--tokens: expected ids in 0..95, found 96"),
        (["--out=x.npz", "--tokens=@none"], "none: cannot be read as text"),
        (["--out=no/x.npz", "--tokens=1"], "no/x.npz: cannot be written: No such file"),
        (["--out=.", "--tokens=1"], ".: cannot be written: it is not a regular file"),
        (["--out=x.npz", "--tokens=1", "--pairing=ds4"], "needs an MTP file"),
        (
            ["--out=x.npz", "--tokens=1", "--gguf=narrow.gguf", "--kv_rounding=ds4"],
            "head_dim: expected head_dim - rope_dim a multiple of 64",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, score, words, message):
    before = sorted(folder.iterdir())
    status, out, err = score("--gguf=trunk.gguf", *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert sorted(folder.iterdir()) == before


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "old.npz"
    path.write_text("old")
    for reason, told in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "full"), FileError),
    ):
        with pytest.raises(told), replacing(path) as part:
            part.write_text("half")
            raise reason
        assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with replacing(path) as part:
        part.write_text("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]
