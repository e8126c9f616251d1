"""Importance matrices: what is summed, the file, and `ds4jax imatrix`.

The text of 17 tokens ends in a pass of one row, in which the MTP head has none.
"""

import functools
import re
import shutil
from types import SimpleNamespace

import commands
import gguf as gguf_py
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import shipped

from ds4jax import gguf, imatrix, schema
from ds4jax.config import QuantPlan
from ds4jax.errors import ConfigError, FileError
from ds4jax.imatrix import Sums
from ds4jax.model import attention, attention_input
from ds4jax.model.importance import collect
from ds4jax.model.layers import Linear
from ds4jax.model.moe import MoE
from ds4jax.model.mtp import pair
from ds4jax.pallas.passes import watching

CONFIG = models.micro_config()
TEXTS = models.text(CONFIG, 17, batch=2)
RTOL = 1e-4
"""Passes of 8 rows over a cache round otherwise than one pass over the text."""


@pytest.fixture(scope="module")
def found():
    return collect(models.lively(CONFIG), TEXTS.tolist(), TEXTS.shape[1])


@pytest.fixture(scope="module")
def seen():
    """Return the inputs of every module, one pass over each text, by its weight.

    Modules are told by their place in the model.  Of a mixture of experts these are
    (inputs, chosen experts), by its block.
    """
    model = models.lively(CONFIG)
    linear, mixture, grouped = Linear.__call__, MoE.__call__, attention.grouped_matmul

    @jax.jit
    def run(text):
        modules = model.modules()
        assert modules.mtp
        blocks = {f"blk.{i}.": layer for i, layer in enumerate(modules.trunk.layers)}
        blocks["mtp.0."] = modules.mtp.layer
        names = {id(modules.trunk.output): "output.weight"}
        names |= {id(getattr(modules.mtp, n)): f"mtp.0.{n}.weight"
                  for n in ("e_proj", "h_proj")}  # fmt: skip
        for blk, layer in blocks.items():
            for n in ("q_a", "q_b", "kv", "output_b"):
                names[id(getattr(layer.attention, n))] = f"{blk}attn_{n}.weight"
            for n in ("gate", "up", "down"):
                shared = getattr(layer.moe, f"shared_{n}")
                names[id(shared)] = f"{blk}ffn_{n}_shexp.weight"
        inputs, projections, mixtures = {}, iter(blocks), iter(blocks)

        def note(name, *what):
            inputs.setdefault(name, []).append(what)

        def see_linear(self, x):
            note(names.get(id(self), "plain"), x)
            return linear(self, x)

        def see_projections(x, *linears, fixed=None):
            return tuple(see_linear(each, x) for each in linears)

        def see_grouped(x, *args):
            note(f"{next(projections)}attn_output_a.weight", x)
            return grouped(x, *args)

        def see_mixture(self, x, *rest):
            out, chosen = mixture(self, x, *rest)
            note(next(mixtures), x[0], chosen[0])
            return out, chosen

        # Watched, for then each layer itself is called.
        with pytest.MonkeyPatch.context() as patch, watching(lambda *_: None):
            patch.setattr(Linear, "__call__", see_linear)
            patch.setattr(attention_input, "project", see_projections)
            patch.setattr(attention, "grouped_matmul", see_grouped)
            patch.setattr(MoE, "__call__", see_mixture)
            out = modules.trunk(text[None])
            streams, following = pair(out.streams, text[None])
            modules.mtp(modules.trunk, following, streams)
        inputs.pop("plain")
        return inputs

    runs = [jax.device_get(run(text)) for text in TEXTS]
    return {name: [call for r in runs for call in r[name]] for name in runs[0]}


def close(found: Sums, squares, counts):
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.squares, squares, RTOL, RTOL * np.max(squares))


def test_a_matrix_has_the_rows_of_the_text_and_of_the_heads_pairs(found, seen):
    """Seen red with the rows that fill a pass up counted, and with pairs (h_p, t_p)."""
    dense = [n for n in seen if n.endswith(".weight")]
    assert len(dense) == 4 * 8 + 3
    for name in dense:
        rows = [x.reshape(-1, x.shape[-1]).astype(np.float64) for (x,) in seen[name]]
        rows = np.concatenate(rows)
        close(found[name], np.square(rows).sum(0)[None], [len(rows)])
    assert found["output.weight"].counts == 2 * (17 + 16)
    assert found["mtp.0.e_proj.weight"].counts == 2 * 16
    assert found["blk.0.attn_output_a.weight"].counts == 2 * 17 * CONFIG.o_groups


def hidden(weights, blk, expert, x):
    """Return an expert's input of its down matrix."""
    gate, up = (
        np.asarray(weights[f"{blk}ffn_{n}_exps.weight"][expert], np.float64) @ x
        for n in ("gate", "up")
    )
    gate = np.minimum(gate, CONFIG.swiglu_limit)
    up = np.clip(up, -CONFIG.swiglu_limit, CONFIG.swiglu_limit)
    return gate / (1 + np.exp(-gate)) * up


def test_an_expert_has_only_the_rows_routed_to_it(found, seen):
    """Seen red with each row given to the expert after the chosen one."""
    model = models.lively(CONFIG)
    for blk in ("blk.0.", "blk.1.", "blk.2.", "mtp.0."):
        counts = np.zeros(CONFIG.experts)
        into = np.zeros((CONFIG.experts, CONFIG.hidden))
        inner = np.zeros((CONFIG.experts, CONFIG.expert_ffn))
        for inputs, chosen in seen[blk]:
            for x, experts in zip(inputs.astype(np.float64), chosen, strict=True):
                for e in experts:
                    counts[e] += 1
                    into[e] += x**2
                    inner[e] += hidden(model.trunk | model.mtp, blk, e, x) ** 2
        assert len(set(counts)) > 1
        close(found[f"{blk}ffn_gate_exps.weight"], into, counts)
        close(found[f"{blk}ffn_up_exps.weight"], into, counts)
        close(found[f"{blk}ffn_down_exps.weight"], inner, counts)


def test_every_matrix_that_a_plan_quantises_is_there_and_no_other(found):
    specs = schema.trunk(CONFIG) | schema.mtp(CONFIG)
    assert found.keys() == {
        n for n, s in specs.items() if s.group in ("dense", "experts", "down")
    }


def test_products_are_watched_in_the_block_only():
    """Seen red with a block that does not reset the watcher."""
    model = models.lively(CONFIG)

    def trace():
        mix = lambda *args: model.modules().trunk.layers[1].moe(*args)  # noqa: E731
        return str(jax.make_jaxpr(mix)(jnp.ones((1, 8, 64)), TEXTS[:1, :8]))

    reports = []
    before = trace()
    with pytest.raises(KeyboardInterrupt), watching(lambda *a: reports.append(a)):
        assert trace() != before
        raise KeyboardInterrupt
    assert [ids is not None for _, _, ids in reports].count(True) == 3
    seen = len(reports)
    assert (trace(), len(reports)) == (before, seen)


SUMS = {
    "dense": Sums(np.array([[2.0, 0, 6]]), np.array([2.0])),
    "experts": Sums(
        np.array([[2.0, 4], [0, 0], [9, 0]]), np.array([2.0, 0, 3])
    ),
    "idle": Sums(np.zeros((2, 2)), np.zeros(2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    imatrix.write(path, SUMS, "a.txt", 3, 512)
    return path


def test_means_of_sums_and_what_an_idle_expert_gets(path):
    means = imatrix.read(path)
    assert {m.dtype for m in means.values()} == {np.dtype(np.float32)}
    expected = {
        "dense": [1, 0, 3],
        "experts": [[1, 2], [2, 1], [3, 0]],
        "idle": [[1, 1], [1, 1]],
    }
    models.assert_same(means, {k: np.float32(v) for k, v in expected.items()})


def test_gguf_py_finds_what_llama_cpp_looks_for(path):
    reader = gguf_py.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["a.txt"]
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (3, 512)
    tensors = {t.name: t for t in reader.tensors}
    assert sorted(tensors) == [f"{n}.{k}" for n in SUMS for k in ("counts", "in_sum2")]
    for name, (squares, counts) in SUMS.items():
        found, number = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert found.shape.tolist() == list(squares.shape[::-1])  # ggml's order
        assert number.shape.tolist() == [1, len(counts)]
        np.testing.assert_array_equal(found.data, squares)
        np.testing.assert_array_equal(number.data[:, 0], counts)


GOOD = {"w.in_sum2": (np.ones((2, 4)), "F32"), "w.counts": (np.ones((2, 1)), "F32")}


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        (None, GOOD, "not an importance matrix in GGUF: general.type: expected"),
        ("model", GOOD, "expected 'imatrix', found 'model'"),
        ("imatrix", {"w": GOOD["w.counts"]}, "expected tensors NAME.in_sum2, found"),
        ("imatrix", {**GOOD, "v.counts": GOOD["w.counts"]}, "v.in_sum2 is missing"),
        ("imatrix", {"w.in_sum2": GOOD["w.in_sum2"]}, "w.counts is missing"),
        (
            "imatrix",
            {**GOOD, "w.counts": (np.ones((3, 1)), "F32")},
            r"w.counts: expected shape \(2, 1\), as w.in_sum2 has \(2, 4\), found",
        ),
        ("imatrix", {**GOOD, "w.counts": (np.ones((2, 1)), "F16")}, "found F16 of"),
        ("imatrix", {**GOOD, "w.in_sum2": (np.ones((2, 2, 4)), "F32")}, "two axes"),
        ("imatrix", {**GOOD, "w.in_sum2": (-np.ones((2, 4)), "F32")}, "at least 0"),
    ],
)
def test_a_malformed_file_is_told_in_one_line(tmp_path, kind, tensors, message):
    path = tmp_path / "x.gguf"
    gguf.write(path, {"general.type": kind} if kind else {}, tensors)
    with pytest.raises(FileError, match=message) as error:
        imatrix.read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_sums_that_are_not_finite_are_not_written(tmp_path):
    sums = {"w": Sums(np.array([[1.0, np.inf]]), np.ones(1))}
    with pytest.raises(ConfigError, match="w.in_sum2: found NaN or infinity"):
        imatrix.write(tmp_path / "x.gguf", sums, "a.txt", 1, 8)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Yield how to run the command in a folder with a pair of files and a text."""
    folder = tmp_path_factory.mktemp("pair")
    shipped.write_pair(folder)
    config = shipped.CONFIG
    weights = models.lively_weights(schema.trunk(config), config, seed=0)
    plan = QuantPlan.named("f32")
    gguf.write_model(folder / "wordless.gguf", config, weights, plan)
    (folder / "a.txt").write_text(shipped.TEXT)
    (folder / "empty.txt").write_text("")

    with commands.command("imatrix") as process:
        run = functools.partial(process.run, folder)
        yield SimpleNamespace(folder=folder, run=run)


def test_the_command_measures_every_matrix_of_a_pair(command):
    status, out, err = command.run(
        "--gguf=trunk.gguf", "--mtp=mtp.gguf", "--text_file=a.txt", "--out=im.gguf",
        "--chunk=12", "--max_tokens=32",
    )  # fmt: skip
    assert (status, err) == (0, "")
    told = re.fullmatch(
        r"im\.gguf: 35 tokens in 3 sequences; 55 matrices, \d+ of them without"
        r" a row; [\d,]+ bytes\n",
        out,
    )
    assert told, out
    file = gguf.read(command.folder / "im.gguf")
    assert file.metadata["imatrix.datasets"] == ["a.txt"]
    assert file.metadata["imatrix.chunk_count"] == 3
    assert file.metadata["imatrix.chunk_size"] == 12
    assert file.tensors["output.weight.counts"].data == 35 + 32
    means = imatrix.read(command.folder / "im.gguf")
    specs = schema.trunk(shipped.CONFIG) | schema.mtp(shipped.CONFIG)
    for name, mean in means.items():
        *experts, _, width = specs[name].shape
        assert mean.shape == (*experts, width), name
        assert (mean > 0).any()


def test_of_a_corpus_all_documents_to_train_on_have_a_part(command):
    """Seen red with held-out documents read too."""
    corpus = command.folder / "corpus"
    for name, text in (
        ("code", "aa " * 400), ("prose", "bb " * 400), ("heldout/code", "cc " * 400),
    ):  # fmt: skip
        (corpus / name).mkdir(parents=True)
        (corpus / name / "a.txt").write_text(text)
    words = ["--gguf=trunk.gguf", "--corpus=corpus", "--out=c.gguf", "--chunk=12"]
    status, out, err = command.run(*words, "--max_tokens=40")
    assert (status, err) == (0, "")
    assert out.startswith("c.gguf: 40 tokens in 4 sequences;")
    status, out, err = command.run(*words, "--max_tokens=9")
    assert (status, err) == (0, "")
    assert out.startswith("c.gguf: 9 tokens in 1 sequences;")
    status, out, err = command.run(*words)
    assert (status, err) == (0, "")
    whole = re.match(r"c\.gguf: (\d+) tokens", out)
    assert whole, out
    shutil.rmtree(corpus / "prose")
    status, out, err = command.run(*words)
    half = re.match(r"c\.gguf: (\d+) tokens", out)
    assert half and 2 * int(half[1]) == int(whole[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--text_file, --corpus and --tokens: expected one of them, to read"),
        (["--corpus=nowhere"], "nowhere: expected a folder of text files, found none"),
        (["--text_file=no.txt"], "no.txt: cannot be read as text"),
        (["--text_file=empty.txt"], "empty.txt: expected text, found none"),
        (["--text_file=a.txt", "--chunk=1"], "flag --chunk=1: 1 is not integer >= 2"),
        (
            ["--text_file=a.txt", "--gguf=wordless.gguf"],
            "wordless.gguf: tokenizer.ggml.tokens: required metadata key is missing",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, words, message):
    before = sorted(command.folder.iterdir())
    status, out, err = command.run("--gguf=trunk.gguf", "--out=x.gguf", *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err
    assert sorted(command.folder.iterdir()) == before
