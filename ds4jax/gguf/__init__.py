"""ds4's GGUF files: load a trunk or an MTP block, checked; write either.

A model's weights are a mapping from the names of `schema.py` to plain arrays (F32, F16,
BF16 and I32 tensors, as views of the mapped file) or `QuantTensor`s.
"""

from ds4jax.gguf.architecture import config, metadata
from ds4jax.gguf.container import GGUF, Tensor, read
from ds4jax.gguf.loading import Weights, load_mtp, load_trunk
from ds4jax.gguf.storing import write_stored
from ds4jax.gguf.writing import WRITABLE_TYPES, write, write_model

__all__ = [
    "GGUF",
    "WRITABLE_TYPES",
    "Tensor",
    "Weights",
    "config",
    "load_mtp",
    "load_trunk",
    "metadata",
    "read",
    "write",
    "write_model",
    "write_stored",
]
