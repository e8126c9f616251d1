"""`ds4jax generate`: what it prints and writes, and the prompts it takes."""

import functools
import hashlib
import json

import commands
import models
import numpy as np
import pytest
import shipped

from ds4jax import gguf, schema
from ds4jax.config import QuantPlan
from ds4jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    trunk, mtp = shipped.write_pair(tmp_path_factory.mktemp("pair"))
    return [f"--gguf={trunk}", f"--mtp={mtp}"]


@pytest.fixture(scope="module")
def tokenizer(files):
    return Tokenizer.from_metadata(gguf.read(files[0].partition("=")[2]).metadata)


@pytest.fixture(scope="module")
def wordless(tmp_path_factory):
    """Return the flag of a trunk without a vocabulary."""
    config = shipped.CONFIG
    weights = models.lively_weights(schema.trunk(config), config, seed=1)
    path = tmp_path_factory.mktemp("wordless") / "trunk.gguf"
    gguf.write_model(path, config, weights, QuantPlan.named("q8_0"))
    return f"--gguf={path}"


@pytest.fixture(scope="module")
def command():
    with commands.command("generate") as command:
        yield command


@pytest.fixture
def generate(command, tmp_path):
    """Return a function that runs the command in `tmp_path`."""
    command.environment = {}
    return functools.partial(command.run, tmp_path)


def test_compares_modes_and_writes_what_it_did(generate, files, tokenizer, tmp_path):
    status, out, err = generate(
        *files, "--prompt=The old man", "--max_tokens=12", "--compare",
        "--stats=stats.json", "--out_tokens=ids.txt",
    )  # fmt: skip
    assert status == 0, err
    stats = json.loads((tmp_path / "stats.json").read_text())
    ids = [int(i) for i in (tmp_path / "ids.txt").read_text().split(",")]
    text = tokenizer.decode(ids) + "\n"
    assert out.startswith(text + text)
    verdict = out.removeprefix(text + text)
    assert verdict.startswith("continuous 1 and plain are identical: 12 tokens,")
    assert verdict.count("\n") == 1
    assert stats["prompt_tokens"] == 1 + len(tokenizer.encode("The old man"))
    assert stats["mode"] == "continuous" and stats["tokens"] == len(ids) == 12
    assert stats["target_passes"] + stats["accepted"] == 12
    assert stats["sha256"] == hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
    assert f"sha256 {stats['sha256'][:16]}" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.txt", "stats.json"]


def test_a_chain_that_samples_is_plains_text(generate, files, tmp_path):
    status, out, err = generate(
        *files, "--prompt=The old man", "--max_tokens=12", "--compare",
        "--mode=chained", "--depth=3", "--temperature=1", "--seed=7", "--gate",
        "--stats=stats.json",
    )  # fmt: skip
    assert status == 0, err
    assert "chained 3 and plain are identical: 12 tokens," in out
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["depth"], stats["output_class"]) == (3, "sampled")
    assert len(stats["accepted_by_place"]) == 3 and stats["base_decodes"] > 0


def test_ds4s_flags_and_switches_choose_a_mode(generate, files, command):
    switches = "CONTINUOUS", "SPEC_LOG", "CONF_LOG", "TIMING", "PROBE"
    command.environment = {f"DS4_MTP_{name}": "0" for name in switches}
    words = *files, "--prompt=The old man", "--max_tokens=6"
    status, out, err = generate(*words, "--mtp_draft=2")
    assert status == 0, err
    assert err.startswith("ds4's row 6 (`DS4_MTP_CONTINUOUS`): continuous, depth 1, b")
    assert err.count("[timing] position ") == err.count("[confidence] position ") + 1
    assert "[continuous 1, batched] 6 tokens in " in err
    status, _, err = generate(*words, "--mtp_draft=1")
    assert status == 0, err
    assert err.startswith("ds4's row 3 (N at most 1): plain\n")
    assert err.count("[probe] position ") == 5 and ", hit " in err
    # The environment alone does nothing.
    status, alone, err = generate(*words)
    assert status == 0 and alone == out
    assert err.startswith("[continuous] compiling ...\n[continuous 1] 6 tokens")
    status, out, err = generate(*words, "--mtp_draft=2", "--stop=a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--stop: expected no log of cycles" in err


def test_a_stop_ends_the_text(generate, files, tokenizer):
    words = *files, "--prompt=The old man", "--max_tokens=12", "--out_tokens=ids.txt"
    _, whole, _ = generate(*words)
    part = whole[3:6]
    status, out, err = generate(*words, f"--stop={part}")
    assert status == 0, err
    end = whole.index(part) + len(part)
    assert whole.startswith(out.removesuffix("\n")) and len(out) > end
    assert part in out and part not in out[: end - 1]


def test_a_chat_of_a_file_is_the_ids_of_its_bytes(generate, files, tokenizer, tmp_path):
    text = "sea\r\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    chat = tokenizer.chat(text, think=True)
    (tmp_path / "prompt.ids").write_text("\n".join(map(str, chat)))
    plain = [*files, "--mode=plain", "--max_tokens=4"]
    found = [
        generate(*plain, *words)
        for words in (
            ["--prompt_file=prompt.txt", "--chat", "--think"],
            ["--tokens=@prompt.ids"],
        )
    ]
    assert [status for status, _, _ in found] == [0, 0], found
    assert found[0][1] == found[1][1]


def test_a_trunk_without_a_vocabulary_takes_and_shows_ids(generate, wordless, tmp_path):
    words = wordless, "--mode=plain", "--max_tokens=3", "--out_tokens=ids.txt"
    status, out, err = generate(*words, "--tokens=1,2")
    assert status == 0, err
    assert out.split() == (tmp_path / "ids.txt").read_text().strip().split(",")
    status, out, err = generate(*words, "--prompt=a")
    assert (status, out) == (2, "")
    assert "trunk.gguf: has no vocabulary to read text with" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a", "--tokens=1"], "--prompt and --tokens: expected one prompt"),
        (["--tokens=1,x"], "--tokens: expected ids such as 1,2,3"),
        (["--tokens=280"], "--tokens: expected ids in 0..279, found 280"),
        (["--tokens="], "--tokens: expected at least one id, found none"),
        (["--tokens=1", "--chat"], "--chat: expected text, found --tokens"),
        (["--prompt=a", "--think"], "--think: expected --chat with it"),
        (["--prompt_file=none.txt"], "none.txt: cannot be read as text"),
        (["--max_tokens=0"], "--max_tokens=0: 0 is not a positive integer"),
        (["--stats=no/where.json"], "no/where.json: cannot be written: No such file"),
        (["--mode=eager"], "mode"),
        (["--mode=plain", "--depth=1"], "--depth: expected 0 when plain, found 1"),
        (["--depth=5"], "--depth: expected 1..4 when continuous, found 5"),
        (["--depth=0"], "--depth: expected 1..4 when continuous, found 0"),
        (["--mode=plain", "--verifier=batched"], "--verifier: expected exact when pla"),
        (["--margin=1"], "--margin: expected 0 unless chained, batched and of depth 1"),
        (["--depth=1", "--quality"], "--depth and --quality: expected our flags or"),
        (
            ["--mode=plain", "--gate"],
            "--gate: expected a mode that drafts, found plain",
        ),
        (["--gate_least=1"], "--gate_least: expected --gate with it, found none"),
        (["--mtp_draft=2", "--gate_least=1"], "--gate_least: expected --gate with it"),
        (["--mode=plain", "--compare"], "--compare: expected a mode that drafts"),
        (["--temperature=-1"], "--temperature=-1: -1.0 is not a non-negative number"),
        (["--temperature=1e-9"], "--temperature: expected 0, or a finite number from"),
        (["--mtp_margin=nan"], "--mtp_margin: expected a number in 0..1000, found nan"),
        (["--prefill_chunk=0"], "--prefill_chunk=0: 0 is not a positive integer"),
        (["--mtp_margin=1001"], "--mtp_margin=1001: 1001.0 is not a number in the ran"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    generate, files, tmp_path, words, message
):
    status, out, err = generate(*files, *words, "--out_tokens=ids.txt")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_continuous_needs_a_head(generate, files):
    status, _, err = generate(files[0], "--prompt=a")
    assert status == 2
    assert "--mode=continuous: needs an MTP file to draft with" in err


def test_more_than_memory_holds_is_told(generate, files):
    status, out, err = generate(*files, "--tokens=1", f"--max_tokens={10**15}")
    assert (status, out) == (2, "")
    assert "out of memory; expected a smaller model or fewer tokens" in err
    assert "Traceback" not in err
