"""Training learns, goes on bit for bit after a stop, balances, and tells its errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
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


def test_a_stopped_run_ends_in_the_same_bits(tmp_path, batches):
    whole = train(tmp_path / "whole", batches)
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


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, batches, monkeypatch):
    whole = train(tmp_path / "whole", batches)
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


def test_two_devices_share_the_batch(tmp_path, batches):
    """They make the step of one device, but for the order in which gradients add up.

    Seen red with each device keeping the gradient of its own windows.
    """
    settings = dataclasses.replace(SETTINGS, steps=2)
    alone = train(tmp_path / "alone", batches, settings)
    script = f"""
import pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import train_test as here
tokenizer = here.corpus.train_tokenizer(here.DOCUMENTS, here.VOCAB)
settings = here.dataclasses.replace(here.SETTINGS, steps=2)
assert here.run.mesh(settings).size == 2
here.train(pathlib.Path("shared"), here.make_batches(tokenizer), settings)
"""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True, text=True, cwd=tmp_path, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = checkpoint.load(tmp_path / "shared" / run.CHECKPOINT, alone, {})
    first = run.first_state(CONFIG, settings)
    flat = lambda s: np.concatenate([*map(np.ravel, jax.tree.leaves(s.weights))])  # noqa: E731
    far = np.linalg.norm(flat(alone) - flat(first))
    # AdamW takes signs: of gradients near 0, rounding turns some.
    assert np.linalg.norm(flat(alone) - flat(shared)) < 0.05 * far


def test_it_learns_from_about_ln_v(tmp_path, batches):
    settings = dataclasses.replace(SETTINGS, steps=100, warmup=10, lr=1e-2)
    start = run.model(run.first_state(CONFIG, settings), CONFIG)
    _, before = losses(start, jnp.asarray(batches.at(0)), 0.5)
    assert abs(float(before.trunk) - np.log(VOCAB)) < 1
    assert abs(float(before.mtp) - np.log(VOCAB)) < 1
    model = run.model(train(tmp_path, batches, settings), CONFIG)
    _, after = losses(model, jnp.asarray(batches.at(1000)), 0.5)
    assert float(after.trunk) < 3.5 and float(after.mtp) < 3.5
    assert float(after.indexer) < float(before.indexer)


def test_every_weight_is_learnt_and_only_the_indexer_imitates(batches):
    state = run.first_state(CONFIG, SETTINGS)
    windows = jnp.asarray(batches.at(0))

    def part(weights, name):
        model = run.model(dataclasses.replace(state, weights=weights), CONFIG)
        total, found = losses(model, windows, 0.5)
        return total if name == "total" else getattr(found, name)

    gradient = jax.jit(jax.grad(part), static_argnums=1)
    total = gradient(state.weights, "total")
    assert [n for n, g in total.items() if not np.any(g)] == []
    indexer = gradient(state.weights, "indexer")
    trunk = gradient(state.weights, "trunk")
    for name in state.weights:
        is_indexer = "indexer" in name
        assert np.any(indexer[name]) == is_indexer, name
        assert np.any(trunk[name]) == (not is_indexer and "mtp" not in name), name


def test_balance_moves_bias_towards_even_loads():
    bias = balanced({"b": jnp.zeros(3)}, {"b": jnp.array([0.5, 0.2, 0.3])})["b"]
    assert np.sign(bias).tolist()[:2] == [-1, 1]


def test_a_score_is_the_mean_over_every_token(documents, tokenizer):
    model = run.model(run.first_state(CONFIG, SETTINGS), CONFIG)
    tokens = corpus.tokenise(tokenizer, documents)[:50]
    score = lambda rows, batch: score_text(model, tokenizer, tokens, rows, batch)  # noqa: E731
    short, padded = score(64, 1), score(70, 3)
    text = jnp.asarray(tokens[None].astype(np.int32))
    _, exact = losses(model, text, 0.5)
    np.testing.assert_allclose(short.mtp, float(exact.mtp), rtol=1e-5)
    network = model.modules()
    logits = network.trunk(text).logits[0, :-1]
    chosen = jax.nn.log_softmax(logits)[np.arange(49), tokens[1:].astype(int)]
    chosen = np.asarray(chosen)
    np.testing.assert_allclose(short.trunk, -np.mean(chosen), rtol=1e-5)
    for a, b in zip(
        dataclasses.astuple(short), dataclasses.astuple(padded), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert short.tokens == 49
    assert short.size == len(tokenizer.decode(tokens[1:].tolist()).encode())
    assert short.bits_per_byte * short.size == pytest.approx(
        -np.sum(chosen) / np.log(2), rel=1e-5
    )


def test_acceptance_is_agreement_with_the_trunk_under_each_pairing(
    documents, tokenizer
):
    model = run.model(run.first_state(CONFIG, SETTINGS), CONFIG)
    tokens = corpus.tokenise(tokenizer, documents)[:200]
    found = score_text(model, tokenizer, tokens, 250, 1)
    network, text = model.modules(), jnp.asarray(tokens[None].astype(np.int32))
    out = network.trunk(text)
    chosen = np.argmax(out.logits[0], -1)
    agree = {}
    for pairing in ("trained", "ds4"):
        streams, joined = pair(out.streams, text, pairing)
        assert network.mtp
        best = np.argmax(network.mtp(network.trunk, joined, streams).logits[0], -1)
        agree[pairing] = best
    trained = agree["trained"][:198] == chosen[1:199]
    assert found.accepted == pytest.approx(np.mean(trained))
    assert found.accepted_ds4 == pytest.approx(
        np.mean(agree["ds4"][:199] == chosen[:199])
    )
    assert 0 < found.accepted < 1


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


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, batches):
    with pytest.raises(ConfigError, match="^lr: the loss is no longer finite"):
        train(tmp_path, batches, dataclasses.replace(SETTINGS, lr=1e30))


@pytest.fixture
def folder(tmp_path, documents):
    for i, document in enumerate(documents):
        kind = "heldout" if document.held_out else "train"
        path = tmp_path / "corpus" / document.source_class / kind / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    return tmp_path


def command(folder, name, *words):
    done = subprocess.run(
        [sys.executable, "-m", "ds4jax", name, f"--corpus={folder}/corpus", *words],
        capture_output=True, text=True, cwd=folder, timeout=500,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_command_trains_exports_and_goes_on(folder):
    words = [
        "train", "--out=run", "--export=files", "--batch=2", f"--vocab={VOCAB}",
        "--steps=2", "--rows=64", "--layers=1",
    ]  # fmt: skip
    status, out, err = command(folder, *words, "--max_minutes=1e-9")
    assert status == 0, err
    assert "stopped at step 1 of 2" in out
    status, out, err = command(folder, *words)
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
        folder, "evaluate", "--gguf=files/trunk.gguf", "--mtp=files/mtp.gguf",
        "--rows=64", "--prompts=1", "--report=x.json",
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
def test_a_bad_flag_is_told_in_one_line(folder, words, expected):
    status, out, err = command(folder, *words)
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
