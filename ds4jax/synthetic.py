"""Random weights of a model's true layout, made faster than they could be encoded.

They serve measurements of speed and memory where there are no real weights: blocks are
random bytes, so nothing is encoded, and a model of them computes finite numbers but
knows nothing.  The same (config, plan, seed) gives the same bits on every device and in
a file, because everything is made of threefry bits by integer arithmetic, table look-up
and one exact or once rounded product.

Every matrix has mean 0 and rms `1 / sqrt(in)` (embedding: 1), so that activations keep
their size from layer to layer.  Vectors are neutral: norms and scales 1, sinks and
biases 0, the hyper-connections' own mixing the identity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Array

from ds4jax import quant, schema
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.errors import ConfigError
from ds4jax.iq2_grid import IQ2_GRID
from ds4jax.quant import QuantTensor

_CHUNK = 2**20
"""32-bit words drawn at once, which bounds the memory of the generator's own arrays."""

_GRID_RMS = float(np.sqrt(np.mean(np.square(IQ2_GRID))))

_SCALES = {
    "Q8_0": {"d": 1 / 73.9},
    # Minima that are on average what they are subtracted from: 1.5 and 7.5 are the
    # mean quants.
    "Q2_K": {"d": 1 / 13.87, "dmin": 1.5 / 13.87},
    "Q4_K": {"d": 1 / 258.3, "dmin": 7.5 / 258.3},
    "Q6_K": {"d": 1 / (73.9 * 18.48)},
    "IQ2_XXS": {"d": 1 / (2.308 * _GRID_RMS)},
}
"""The float16 scales of random blocks of rms 1: one over the rms of uniform quants
times uniform sub-scales."""

_SPREAD = np.linspace(0.75, 1.25, 16)
"""The scales of a tensor, relative to their mean: 16 levels, equally likely."""

_MXFP4_RMS = 2.926
"""Of its 16 codes."""


def shorten(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the architecture of the first `layers` layers alone.

    Raises:
      ConfigError: if there are not as many.
    """
    if not 1 <= layers <= config.layers:
        raise ConfigError(f"layers: expected 1..{config.layers}, found {layers}")
    return dataclasses.replace(
        config,
        layers=layers,
        compress_ratios=config.compress_ratios[:layers],
        hash_layers=min(config.hash_layers, layers),
    )


def weights(
    config: ModelConfig, plan: QuantPlan, seed: int = 0, *, mtp: bool = False
) -> dict[str, QuantTensor | Array]:
    """Return a trunk or, for `mtp`, an MTP block on the default device.

    They are made there one by one; the host holds none of them.

    Raises:
      ConfigError: as `tensor`.
    """
    specs = schema.mtp(config) if mtp else schema.trunk(config)
    return {
        name: tensor(config, name, spec, plan.types[spec.group], seed)
        for name, spec in specs.items()
    }


def tensor(
    config: ModelConfig, name: str, spec: schema.TensorSpec, type: str, seed: int = 0
) -> QuantTensor | Array:
    """Return one tensor on the default device; it depends on no other.

    Args:
      config: the model's.
      name, spec: as in `schema.py`.
      type: ggml type to store it as.
      seed: of the model.

    Raises:
      ConfigError: if rows are not whole blocks of `type`.
    """
    if spec.group == "vector":
        return jnp.asarray(schema.neutral(config, name, spec.shape))
    # Threefry, whatever the default: other generators differ between devices.
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if spec.group == "table":
        return _table(key, spec.shape, config.experts)
    rms = 1.0 if name == "token_embd.weight" else spec.shape[-1] ** -0.5
    if type not in quant.FORMATS:
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[type]
        return _plain(key, np.float32(rms * math.sqrt(3) / 2**15), spec.shape, dtype)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    if spec.shape[-1] % block:
        raise ConfigError(
            f"{name}: {type} needs a last axis that is a multiple of {block}, found"
            f" shape {spec.shape}"
        )
    return blocks(key, type, spec.shape, rms)


def blocks(
    key: Array, format: str, shape: tuple[int, ...], rms: float | None = None
) -> QuantTensor:
    """Return random blocks whose values have `rms`, 1 / sqrt(in) if not given."""
    return _blocks(key, _levels(format, rms or shape[-1] ** -0.5), shape, format)


def stored(weight: QuantTensor | Array) -> np.ndarray:
    """Return the bytes of a tensor in a file, uint8."""
    if isinstance(weight, QuantTensor):
        return quant.unpack(weight)
    return np.asarray(weight).view(np.uint8)


def _levels(format: str, rms: float) -> dict[str, np.ndarray]:
    """Return the 16 values that each plane of scales has, for weights of `rms`."""
    if format != "MXFP4":
        return {
            plane: (scale * rms * _SPREAD).astype(np.float16)
            for plane, scale in _SCALES[format].items()
        }
    # Two powers of two, as often as makes the mean square right.
    low = math.floor(math.log2(rms / _MXFP4_RMS))
    share = ((rms / _MXFP4_RMS / 2**low) ** 2 - 1) / 3
    return {"exponents": np.uint8(127 + low) + (np.arange(16) < 16 * share)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _table(key: Array, shape: tuple[int, ...], experts: int) -> Array:
    """Return runs of expert ids from a random start: any expert, none twice."""
    start = _bits(key, (*shape[:-1], 1), "uint32") % experts
    return (start.astype(jnp.int32) + jnp.arange(shape[-1])) % experts


@functools.partial(jax.jit, static_argnums=(2, 3))
def _plain(key: Array, step: Array, shape: tuple[int, ...], dtype: str) -> Array:
    return (_bits(key, shape, "int16").astype(jnp.float32) * step).astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _blocks(
    key: Array, levels: dict[str, Array], shape: tuple[int, ...], format: str
) -> QuantTensor:
    """Return random planes, those of scales from their levels."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    one = quant.pack(format, np.zeros(block_bytes, np.uint8))
    planes = {}
    for number, (plane, items) in enumerate(one.planes.items()):
        size = (*shape[:-1], shape[-1] // block * len(items))
        own = jax.random.fold_in(key, number)
        if plane in levels:
            planes[plane] = levels[plane][_bits(own, size, "uint8") & 15]
        elif format == "Q4_K" and plane in ("scales", "mins"):
            planes[plane] = _bits(own, size, "uint8") & 63
        else:
            planes[plane] = _bits(own, size, items.dtype.name)
    return QuantTensor(format, planes)


def _bits(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Return random integers of any width, in chunks of 32-bit words."""
    per_word = 4 // np.dtype(dtype).itemsize
    size = math.prod(shape)
    words = -(-size // per_word)
    chunk = min(_CHUNK, words)

    def draw(number):
        bits = jax.random.bits(jax.random.fold_in(key, number), (chunk,), jnp.uint32)
        return jax.lax.bitcast_convert_type(bits, dtype)

    drawn = jax.lax.map(draw, jnp.arange(-(-words // chunk)))
    return drawn.reshape(-1)[:size].reshape(shape)
