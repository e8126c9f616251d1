"""Train the tiny model: trunk and MTP head together, from a folder of text.

    ds4jax train --corpus=DIR --out=runs/tiny --export=runs/tiny
    ds4jax convert --gguf=runs/tiny/trunk.gguf --mtp=runs/tiny/mtp.gguf --plan=ds4-q2 \
        --out=trunk.gguf --mtp_out=mtp.gguf

The folder's text becomes a vocabulary and tokens, which are kept in --out beside the
checkpoint, loss.csv, loss.png and, at the end, evaluation.json: bits per byte and draft
acceptance on held-out text.  The same command goes on with a run that was stopped, and
ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import flags

from ds4jax import gguf, synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError
from ds4jax.files import make_folder, replacing
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer
from ds4jax.train import corpus, data, run
from ds4jax.train.prepared import prepare
from ds4jax.train.report import Scope, evaluate

_CORPUS = flags.DEFINE_string("corpus", None, "Folder of text.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the run.", required=True)
_EXPORT = flags.DEFINE_string(
    "export", None, "Folder to write trunk.gguf and mtp.gguf (f32) to, in the end."
)
_VOCAB = flags.DEFINE_integer("vocab", 4096, "Tokens of the vocabulary.")
_LAYERS = flags.DEFINE_integer(
    "layers", ModelConfig.tiny().layers, "Leading layers of the tiny model to train."
)
_STEPS = flags.DEFINE_integer("steps", 10_000, "Steps of the whole run.")
_BATCH = flags.DEFINE_integer("batch", 32, "Sequences of a step.")
_ROWS = flags.DEFINE_integer("rows", 1024, "Tokens of a sequence.")
_LR = flags.DEFINE_float("lr", 3e-3, "Peak of the learning rate.")
_WARMUP = flags.DEFINE_integer("warmup", 200, "Steps of its rise.")
_MTP_WEIGHT = flags.DEFINE_float("mtp_weight", 0.5, "Weight of the MTP head's loss.")
_COPY_SHARE = flags.DEFINE_float("copy_share", 0.3, "Share of sequences that copy.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the weights and of the batches.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Operands of the matrix products; bfloat16 on a GPU, else float32, when not given.",
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 1000, "Steps between checkpoints."
)
_MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "Stop training, with a checkpoint, this long after the start."
)


def main(argv: Sequence[str]):
    """Train, evaluate and export as the flags say.

    Raises:
      ConfigError: for a flag out of range, or a run made with other flags.
      FileError: for files that cannot be read or written.
    """
    begun = time.monotonic()
    for flag in (_CHECKPOINT_EVERY, _MAX_MINUTES):
        if flag.value is not None and not flag.value > 0:
            raise ConfigError(f"{flag.name}: expected above 0, found {flag.value}")
    settings = run.Settings(
        steps=_STEPS.value,
        batch=_BATCH.value,
        rows=_ROWS.value,
        lr=_LR.value,
        warmup=_WARMUP.value,
        mtp_weight=_MTP_WEIGHT.value,
        copy_share=_COPY_SHARE.value,
        seed=_SEED.value,
    )
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    tiny = ModelConfig.tiny(vocab=_VOCAB.value, dtype=_DTYPE.value or dtype)
    config = synthetic.shorten(tiny, _LAYERS.value)
    documents = corpus.read_corpus(_CORPUS.value)
    folder = make_folder("out", _OUT.value)
    export = make_folder("export", _EXPORT.value) if _EXPORT.value else None
    tokenizer, tokens, digest = prepare(folder, documents, _VOCAB.value)
    batches = data.Batches(
        tokenizer,
        tokens,
        settings.batch,
        settings.rows,
        settings.copy_share,
        settings.seed,
    )
    minutes = _MAX_MINUTES.value
    deadline = float("inf") if minutes is None else begun + 60 * minutes
    state = run.train(
        folder,
        config,
        settings,
        batches,
        {"corpus": digest},
        _CHECKPOINT_EVERY.value,
        deadline,
    )
    model = run.model(state, config)
    _plot(folder)
    if export:
        _export(export, model, tokenizer)
    if (step := int(state.step)) < settings.steps:
        print(f"stopped at step {step} of {settings.steps}; the same command goes on")
        return
    scope = Scope(rows=settings.rows, batch=settings.batch, passage=settings.rows // 8)
    results = evaluate(model, tokenizer, documents, scope)
    with replacing(folder / "evaluation.json") as part:
        part.write_text(json.dumps(results, indent=2) + "\n")


def _export(folder: Path, model: Model, tokenizer: Tokenizer):
    plan = QuantPlan.named("f32")
    for name, weights in (("trunk", model.trunk), ("mtp", model.mtp)):
        path = folder / f"{name}.gguf"
        extra = tokenizer.metadata() if name == "trunk" else {}
        host = jax.tree.map(np.asarray, weights)
        gguf.write_model(path, model.config, host, plan, extra)
        print(f"wrote {path}: {path.stat().st_size:,} bytes", flush=True)


def _plot(folder: Path):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    log = run.read_log(folder / run.LOG)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("trunk", "trunk: next token"), ("mtp", "MTP: the one after")):
        axes.plot([r["step"] for r in log], [r[name] for r in log], label=label)
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0, None))
    axes.legend()
    with replacing(folder / "loss.png") as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
