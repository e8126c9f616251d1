"""The golden vectors: a tiny model's weights and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ds4jax import hf
from ds4jax.config import ModelConfig

PATH = Path(__file__).with_name("tiny.npz")


def load() -> tuple[
    ModelConfig,
    Mapping[str, np.ndarray],
    Mapping[str, np.ndarray],
    dict[str, np.ndarray],
]:
    """Return (config, trunk, mtp, outputs), the weights by GGUF name.

    `outputs` holds, for B sequences of T tokens:

      tokens           [B, T]           int32
      streams          [L + 1, B, T, M, D], before the first layer and after each
      router           [L, B, T, U]     experts used, in no order
      router_logits    [L, B, T, E]
      indexer          [CSA layers, B, T, k]  rows kept, -1 where fewer exist
      indexer_scores   [CSA layers, B, T, C]  of every row, also those after t
      hidden           [B, T, D]        normed, before the LM head
      logits           [B, T, V]        of one pass over T tokens
      decode_logits    [B, T, V]        of T passes over one token
      mtp_logits       [B, T - 1, V]    of (h_p, t_{p+1}), the trained pairing
      mtp_streams      [B, T - 1, M, D]
      mtp_ds4_logits   [B, T, V]        of (h_p, t_p), ds4's pairing
      mtp_ds4_streams  [B, T, M, D]
    """
    with np.load(PATH) as stored:
        arrays = dict(stored)
    config = hf.config(json.loads(str(arrays.pop("config"))))
    prefix = "weights/"
    weights = {
        name.removeprefix(prefix): arrays.pop(name)
        for name in list(arrays)
        if name.startswith(prefix)
    }
    return config, *hf.named(config, weights, PATH.name), arrays
