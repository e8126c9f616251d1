"""A pair of GGUF files as ds4jax ships them, but small and untrained."""

from __future__ import annotations

from pathlib import Path

import models

from ds4jax import gguf, schema
from ds4jax.config import QuantPlan
from ds4jax.train.corpus import Document, train_tokenizer

TEXT = "The sea was calm; the old man rowed home. " * 8


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write trunk.gguf and mtp.gguf of a micro model with a byte vocabulary."""
    config = models.micro_config(vocab=280)
    tokenizer = train_tokenizer([Document(TEXT, "prose")], config.vocab)
    plan = QuantPlan.named("q8_0")
    paths = folder / "trunk.gguf", folder / "mtp.gguf"
    specs = schema.trunk(config), schema.mtp(config)
    for path, spec, extra in zip(
        paths, specs, (tokenizer.metadata(), None), strict=True
    ):
        weights = models.lively_weights(spec, config, seed=1)
        gguf.write_model(path, config, weights, plan, extra)
    return paths
