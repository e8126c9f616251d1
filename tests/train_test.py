"""Training learns, goes on bit for bit after a stop, balances, and tells its errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from ds4jax import gguf, synthetic
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError, FileError
from ds4jax.model.mtp import pair
from ds4jax.tokenizer import Tokenizer
from ds4jax.train import checkpoint, corpus, data, run
from ds4jax.train.evaluation import score_text
from ds4jax.train.loss import balanced, losses
from ds4jax.train.prepared import prepare

VOCAB = 280
CONFIG = ModelConfig(
    vocab=VOCAB, hidden=32, layers=2, heads=2, head_dim=32, rope_dim=16, q_lora=32,
    o_lora=32, o_groups=1, window=16, compress_ratios=(4, 8), index_heads=2,
    index_dim=32, index_topk=3, experts=4, experts_used=2, expert_ffn=32,
    hash_layers=1, sinkhorn_iters=3,
)  # fmt: skip
SETTINGS = run.Settings(steps=6, batch=2, rows=32, warmup=2, copy_share=0.0)
EVER = 10**9
measure = jax.jit(losses, static_argnames="mtp_weight")


def text(seed, lines=40):
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "lambda", "zeta", "return", "while"]
    return "".join(" ".join(rng.choice(words, 6)) + "\n" for _ in range(lines))


DOCUMENTS = [
    corpus.Document(text(i), "code" if i % 2 else "prose", held_out=i > 7)
    for i in range(10)
]


@pytest.fixture(scope="module")
def documents():
    return DOCUMENTS


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(DOCUMENTS, VOCAB)


def make_batches(tokenizer):
    tokens = {"all": corpus.tokenise(tokenizer, DOCUMENTS)}
    return data.Batches(tokenizer, tokens, 2, 32, 0.0, 0)


@pytest.fixture(scope="module")
def batches(tokenizer):
    return make_batches(tokenizer)


def train(folder, batches, settings=SETTINGS, deadline=float("inf"), every=EVER):
    folder.mkdir(exist_ok=True)
    return run.train(folder, CONFIG, settings, batches, {}, every, deadline)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, batches):
    """Return the last state of a run that nothing stopped."""
    return train(tmp_path_factory.mktemp("whole"), batches)


def test_a_stopped_run_ends_in_the_same_bits(tmp_path, batches, whole):
    part = tmp_path / "parts"
    for step in range(1, 3):  # a deadline that has passed stops after each step
        assert int(train(part, batches, deadline=0.0).step) == step
    resumed = train(part, batches)
    assert int(resumed.step) == SETTINGS.steps
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    first = jax.tree.leaves(run.first_state(CONFIG, SETTINGS))
    assert any(
        (a != b).any() for a, b in zip(first, jax.tree.leaves(whole), strict=True)
    )


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path, batches, whole, monkeypatch
):
    real, made = run.train_step, []

    def killed(*args):
        made.append(args)
        if len(made) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run, "train_step", killed)
    monkeypatch.setattr(run, "LOG_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", batches, every=4)
    assert [r["step"] for r in run.read_log(tmp_path / "killed" / run.LOG)] == [
        1, 2, 3, 4, 5]  # fmt: skip
    monkeypatch.setattr(run, "train_step", real)
    resumed = train(tmp_path / "killed", batches)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    steps = [r["step"] for r in run.read_log(tmp_path / "killed" / run.LOG)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not [*tmp_path.rglob("*.part*")]


def test_two_devices_share_the_batch(tmp_path, whole):
    """They make the step of one device, but for the order in which gradients add up.

    Seen red with each device keeping the gradient of its own windows.
    """
    script = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import train_test as here
tokenizer = here.corpus.train_tokenizer(here.DOCUMENTS, here.VOCAB)
assert here.run.mesh(here.SETTINGS).size == 2
here.train(pathlib.Path("shared"), here.make_batches(tokenizer))
"""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = checkpoint.load(tmp_path / "shared" / run.CHECKPOINT, whole, {})
    first = run.first_state(CONFIG, SETTINGS)
    flat = lambda s: np.concatenate([*map(np.ravel, jax.tree.leaves(s.weights))])  # noqa: E731
    far = np.linalg.norm(flat(whole) - flat(first))
    # AdamW takes signs: of gradients near 0, rounding turns some.
    assert np.linalg.norm(flat(whole) - flat(shared)) < 0.05 * far


def test_it_learns_from_about_ln_v(tmp_path, batches):
    settings = dataclasses.replace(SETTINGS, steps=100, warmup=10, lr=1e-2)
    start = run.model(run.first_state(CONFIG, settings), CONFIG)
    _, before = measure(start, jnp.asarray(batches.at(0)), mtp_weight=0.5)
    assert abs(float(before.trunk) - np.log(VOCAB)) < 1
    assert abs(float(before.mtp) - np.log(VOCAB)) < 1
    model = run.model(train(tmp_path, batches, settings), CONFIG)
    _, after = measure(model, jnp.asarray(batches.at(1000)), mtp_weight=0.5)
    assert float(after.trunk) < 3.5 and float(after.mtp) < 3.5
    assert float(after.indexer) < float(before.indexer)


def test_every_weight_is_learnt_and_only_the_indexer_imitates(batches):
    state = run.first_state(CONFIG, SETTINGS)
    windows = jnp.asarray(batches.at(0))

    def parts(weights):
        model = run.model(dataclasses.replace(state, weights=weights), CONFIG)
        total, found = losses(model, windows, 0.5)
        return jnp.stack([total, found.indexer, found.trunk])

    gradients = jax.device_get(jax.jit(jax.jacrev(parts))(state.weights))
    for name, (total, indexer, trunk) in gradients.items():
        is_indexer = "indexer" in name
        assert np.any(total), name
        assert np.any(indexer) == is_indexer, name
        assert np.any(trunk) == (not is_indexer and "mtp" not in name), name


def test_balance_moves_bias_towards_even_loads():
    bias = balanced({"b": jnp.zeros(3)}, {"b": jnp.array([0.5, 0.2, 0.3])})["b"]
    assert np.sign(bias).tolist()[:2] == [-1, 1]


@pytest.fixture(scope="module")
def fresh():
    return run.model(run.first_state(CONFIG, SETTINGS), CONFIG)


@pytest.fixture(scope="module")
def tokens(documents, tokenizer):
    return corpus.tokenise(tokenizer, documents)[:200]


@pytest.fixture(scope="module")
def score(fresh, tokenizer, tokens):
    """Return the score of a text that is shorter than a window."""
    return score_text(fresh, tokenizer, tokens, rows=250, batch=1)


@pytest.fixture(scope="module")
def ids(tokens):
    return jnp.asarray(tokens[None].astype(np.int32))


@pytest.fixture(scope="module")
def read(fresh, ids):
    """Return the trunk's own pass over that text."""
    return models.trunk(fresh, ids)


def test_a_score_is_the_mean_over_every_token(
    fresh, tokenizer, tokens, score, ids, read
):
    _, exact = measure(fresh, ids, mtp_weight=0.5)
    np.testing.assert_allclose(score.mtp, float(exact.mtp), rtol=1e-5)
    logprobs = jax.nn.log_softmax(read.logits[0, :-1])
    chosen = np.asarray(logprobs)[np.arange(199), tokens[1:].astype(int)]
    np.testing.assert_allclose(score.trunk, -np.mean(chosen), rtol=1e-5)
    padded = score_text(fresh, tokenizer, tokens, rows=260, batch=3)
    for a, b in zip(
        dataclasses.astuple(score), dataclasses.astuple(padded), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert score.tokens == 199
    assert score.size == len(tokenizer.decode(tokens[1:].tolist()).encode())
    assert score.bits_per_byte * score.size == pytest.approx(
        -np.sum(chosen) / np.log(2), rel=1e-5
    )


def test_acceptance_is_agreement_with_the_trunk_under_each_pairing(
    fresh, score, ids, read
):
    chosen = np.argmax(read.logits[0], -1)
    agree = {}
    for pairing in ("trained", "ds4"):
        streams, joined = pair(read.streams, ids, pairing)
        agree[pairing] = np.argmax(models.mtp(fresh, joined, streams).logits[0], -1)
    trained = agree["trained"][:198] == chosen[1:199]
    assert score.accepted == pytest.approx(np.mean(trained))
    assert score.accepted_ds4 == pytest.approx(
        np.mean(agree["ds4"][:199] == chosen[:199])
    )
    assert 0 < score.accepted < 1


def test_another_run_is_not_continued(tmp_path, batches):
    train(tmp_path, batches, deadline=0.0)
    with pytest.raises(ConfigError, match=r"^lr: .*0\.003.*0\.1"):
        train(tmp_path, batches, dataclasses.replace(SETTINGS, lr=0.1))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_broken_checkpoint_is_named(tmp_path, batches, content):
    (tmp_path / run.CHECKPOINT).write_bytes(content)
    with pytest.raises(FileError, match="checkpoint.safetensors: cannot be read"):
        train(tmp_path, batches)


def test_a_checkpoint_of_other_arrays_is_named(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"a": np.zeros(2, np.float32)}, {"x": 1})
    with pytest.raises(FileError, match="'a'.*float32 .3,.*found float32 .2,"):
        checkpoint.load(path, {"a": np.zeros(3, np.float32)}, {"x": 1})
    with pytest.raises(FileError, match="'b'.*found nothing"):
        checkpoint.load(path, {"b": np.zeros(2, np.float32)}, {})


@pytest.mark.parametrize("part", ["trunk", "mtp"])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, batches, monkeypatch, part):
    real = run.train_step

    def diverging(*args):
        state, found = real(*args)
        return state, dataclasses.replace(
            found, **{part: getattr(found, part) * np.inf}
        )

    monkeypatch.setattr(run, "train_step", diverging)
    with pytest.raises(ConfigError, match="^lr: the loss is no longer finite"):
        train(tmp_path, batches)


@pytest.fixture
def folder(tmp_path, documents):
    for i, document in enumerate(documents):
        kind = "heldout" if document.held_out else "train"
        path = tmp_path / "corpus" / document.source_class / kind / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Held-out text is measured twice, whole; a few windows of it are enough.
        path.write_text(document.text[: 400 if document.held_out else None])
    return tmp_path


@pytest.fixture(scope="module")
def processes():
    """Return the processes of both commands, by name."""
    with commands.command("train") as train, commands.command("evaluate") as evaluate:
        yield {"train": train, "evaluate": evaluate}


@pytest.fixture
def command(processes, folder):
    """Return a function that runs a command of this name in `folder`."""

    def run(name, *words):
        return processes[name].run(folder, f"--corpus={folder}/corpus", *words)

    return run


def test_the_command_trains_exports_and_goes_on(command, folder):
    words = [
        "train", "--out=run", "--export=files", "--batch=2", f"--vocab={VOCAB}",
        "--steps=2", "--rows=64", "--layers=1",
    ]  # fmt: skip
    status, out, err = command(*words, "--max_minutes=1e-9")
    assert status == 0, err
    assert "stopped at step 1 of 2" in out
    status, out, err = command(*words)
    assert status == 0, err
    found = json.loads((folder / "run/evaluation.json").read_text())
    assert {*found} == {"code", "prose", "copies"}
    assert 0 < found["code"]["bits_per_byte"] < 20
    assert found["prose"]["decoded"]["committed"] == 8 * 112
    assert (folder / "run/loss.png").stat().st_size > 1000
    config, trunk = gguf.load_trunk(folder / "files/trunk.gguf")
    assert config == synthetic.shorten(ModelConfig.tiny(vocab=VOCAB), 1)
    assert gguf.load_mtp(folder / "files/mtp.gguf", config)
    metadata = gguf.read(folder / "files/trunk.gguf").metadata
    assert Tokenizer.from_metadata(metadata).vocab_size == VOCAB
    status, out, err = command(
        "evaluate", "--gguf=files/trunk.gguf", "--mtp=files/mtp.gguf", "--rows=64",
         "--prompts=1", "--max_tokens=8", "--report=x.json",
    )  # fmt: skip
    assert status == 0, err
    assert out.count("bits per byte") == 3
    again = json.loads((folder / "x.json").read_text())
    # In batches of 8 windows rather than 2, which sums in another order.
    for name in ("code", "prose"):  # there is one prompt to copy now, not 8
        assert again[name]["trunk"] == pytest.approx(found[name]["trunk"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"rows": 4}, "rows: expected at least 8"),
        ({"lr": -1.0}, "lr: expected a positive"),
        ({"mtp_weight": -1.0}, "mtp_weight: expected"),
    ],
)
def test_settings_out_of_range_are_named(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train", "--out=run", "--max_minutes=0"], "max_minutes: expected above 0"),
        (["train", "--out=/dev/null/x"], "--out=/dev/null/x: "),
        (["train", "--out=run", "--layers=7"], "layers: expected 1..6, found 7"),
        (["evaluate", "--report=no/x.json"], "no/x.json: cannot be written"),
    ],
)
def test_a_bad_flag_is_told_in_one_line(command, words, expected):
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert expected in err and err.count("\n") == 1


def test_a_corpus_is_prepared_once_and_only_for_its_run(tmp_path, documents):
    first = prepare(tmp_path, documents, VOCAB)
    again = prepare(tmp_path, documents, VOCAB)
    assert again[0].tokens == first[0].tokens and again[2] == first[2]
    assert {*first[1]} == {"code", "prose"}
    for name, tokens in first[1].items():
        np.testing.assert_array_equal(again[1][name], tokens)
    with pytest.raises(ConfigError, match="holds a run on another corpus"):
        prepare(tmp_path, documents[1:], VOCAB)
