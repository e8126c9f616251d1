"""A pair of GGUF files as ds4jax ships them, but small and untrained."""

from __future__ import annotations

from pathlib import Path

import models

from ds4jax import gguf, schema
from ds4jax.config import QuantPlan
from ds4jax.train.corpus import Document, train_tokenizer

TEXT = "The sea was calm; the old man rowed home. " * 8
CONFIG = models.slim_config(vocab=280)


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write trunk.gguf and mtp.gguf of CONFIG with a byte vocabulary."""
    tokenizer = train_tokenizer([Document(TEXT, "prose")], CONFIG.vocab)
    plan = QuantPlan.named("q8_0")
    paths = folder / "trunk.gguf", folder / "mtp.gguf"
    specs = schema.trunk(CONFIG), schema.mtp(CONFIG)
    for path, spec, extra in zip(
        paths, specs, (tokenizer.metadata(), None), strict=True
    ):
        weights = models.lively_weights(spec, CONFIG, seed=1)
        gguf.write_model(path, CONFIG, weights, plan, extra)
    return paths
