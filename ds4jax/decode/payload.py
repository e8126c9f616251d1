"""A live sequence in one file, and back: the run goes on as if never interrupted.

The file is safetensors.  Its arrays are the carry's leaves by name; those that grow
with the context are cut to what is live, the rings are whole, so that a rewind within
the slack finds its rows.  Its metadata are `ds4jax.session`, a JSON header, and
`sha256`, the digest of every other byte of the file.

ds4's payload (SPECULATION §3) has neither anchor nor MTP state, so a restored session
drafts anew, and takes any weights of the right shapes.  Here both are kept, and a
fingerprint of the weights is compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ds4jax.config import ModelConfig
from ds4jax.decode import driver
from ds4jax.decode.carry import DecodeCarry
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding
from ds4jax.decode.transitions import drop_anchor
from ds4jax.errors import CapacityError, ConfigError, FileError
from ds4jax.files import replacing
from ds4jax.model.deepseek import Model
from ds4jax.pallas.passes import Weight
from ds4jax.quant import QuantTensor

VERSION = 1
"""Of the format; another one is refused."""

_HEADER = "ds4jax.session"
_CHECKSUM = "sha256"
# A quote within the JSON header is escaped, so this is the metadata's own key.
_CHECKSUM_MARK = f'"{_CHECKSUM}":"'.encode()
_CHECKSUM_DIGITS = 64

_SAMPLES = 256
"""Values of each tensor, about, that a fingerprint looks at."""


def fingerprint(weights: Mapping[str, Weight]) -> str:
    """Return a digest of names, shapes, types and some of the values of weights.

    A few hundred values of each tensor, taken on the device, so that it costs little
    for a model of any size.  Packed and dequantised weights differ.
    """
    samples = jax.device_get(_sample(dict(weights)))
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        is_packed = isinstance(weight, QuantTensor)
        kind = weight.format if is_packed else np.dtype(weight.dtype).name
        digest.update(f"{name} {kind} {tuple(weight.shape)}\n".encode())
        for values in jax.tree.leaves(samples[name]):
            digest.update(values.tobytes())
    return digest.hexdigest()


@jax.jit
def _sample(weights: dict[str, Weight]) -> dict[str, Weight]:
    # The stride is odd, so that it does not stay in one column of a matrix.
    stride = lambda size: max(size // _SAMPLES, 1) | 1  # noqa: E731
    return jax.tree.map(
        lambda x: jax.lax.slice(x.reshape(-1), (0,), (x.size,), (stride(x.size),)),
        weights,
    )


def save(path: str | Path, model: Model, carry: DecodeCarry):
    """Write a sequence to a file, which is complete or not there.

    Args:
      path: where; what was there is replaced.
      model: whose state it is.
      carry: one sequence, B = 1; it stays usable.

    Raises:
      ConfigError: if the carry holds several sequences.
      FileError: if the file cannot be written.
    """
    batch = carry.length.shape[0]
    if batch != 1:
        raise ConfigError(
            f"sequences: expected 1 to save, found {batch}; see carry.select"
        )
    length = int(carry.length[0])
    arrays = {name: np.asarray(leaf) for name, leaf in _by_name(carry).items()}
    for name, rows in _live_rows(model.config, length).items():
        arrays[name] = np.ascontiguousarray(arrays[name][:, :rows])
    header = {
        "version": VERSION,
        "config": dataclasses.asdict(model.config),
        "trunk": fingerprint(model.trunk),
        "mtp": None if carry.mtp_cache is None else fingerprint(model.mtp),
        "max_context": carry.max_context,
        "length": length,
        "rng": str(jax.random.key_impl(carry.rng)),
    }
    metadata = {_HEADER: json.dumps(header), _CHECKSUM: "0" * _CHECKSUM_DIGITS}
    with replacing(Path(path)) as part:
        safetensors.numpy.save_file(arrays, part, metadata)
        with part.open("r+b") as file:
            at, digest = _checksum(file)
            file.seek(at)
            file.write(digest.encode())


def restore(
    path: str | Path,
    model: Model,
    max_context: int | None = None,
    decoding: Decoding = CONTINUOUS,
) -> DecodeCarry:
    """Read a sequence that `save` wrote.

    To continue is to repeat the bits of the uninterrupted run, if the context is of
    the same size (another is another program); what is seen of the state is the same
    in any.  With policy `parity` the anchor is dropped, as after every sync.

    Args:
      path: the file.
      model: the one it was saved with.
      max_context: most tokens the sequence may hold, rounded up as by `driver.create`;
        by default as saved.
      decoding: what it will be used with.

    Raises:
      FileError: if it cannot be read, is damaged, is no such file, of another version,
        or of another model's weights.
      ConfigError: if it is of another architecture, or has the state of an MTP head
        and the model none, or the other way around and `decoding` drafts.
      CapacityError: if its tokens do not fit the context.
    """
    header, arrays = _read(path)
    _check_model(path, header, model, decoding)
    has_head, length = header["mtp"] is not None, header["length"]
    size = header["max_context"] if max_context is None else max_context
    how = CONTINUOUS if has_head else GREEDY
    template = jax.eval_shape(lambda: driver.create(model, size, how))
    if length > template.max_context:
        raise CapacityError(
            f"max_context: expected at least {length}, the tokens in {path}, found "
            f"{size}"
        )
    leaves = _pad(path, arrays, _by_name(template), _live_rows(model.config, length))
    carry = jax.tree.unflatten(jax.tree.structure(template), leaves)
    carry = dataclasses.replace(
        carry, rng=jax.random.wrap_key_data(carry.rng, impl=header["rng"])
    )
    if decoding.policy == "parity":
        carry = drop_anchor(carry, jnp.ones_like(carry.done))
    return carry


def _by_name(carry: DecodeCarry) -> dict[str, Any]:
    """Return the carry's leaves by name, its keys as numbers; or their shapes."""
    numbers = jax.random.key_data
    if isinstance(carry.rng, jax.ShapeDtypeStruct):
        numbers = lambda key: jax.eval_shape(jax.random.key_data, key)  # noqa: E731
    carry = dataclasses.replace(carry, rng=numbers(carry.rng))
    return {
        jax.tree_util.keystr(at, simple=True, separator="."): leaf
        for at, leaf in jax.tree_util.tree_leaves_with_path(carry)
    }


def _live_rows(config: ModelConfig, length: int) -> dict[str, int]:
    """Return how much is live of each array that grows with the context, by name."""
    live = {"tokens": length}
    for layer, ratio in enumerate(config.compress_ratios):
        if ratio:
            live[f"cache.layers.{layer}.compressor.rows"] = length // ratio
        if config.is_csa(layer):
            live[f"cache.layers.{layer}.indexer.rows"] = length // ratio
    return live


def _pad(
    path: str | Path,
    arrays: dict[str, np.ndarray],
    template: dict[str, jax.ShapeDtypeStruct],
    live: dict[str, int],
) -> list[jax.Array]:
    """Return the file's arrays in the template's order, filled up to its shapes."""
    for name in arrays.keys() - template.keys():
        raise FileError(f"{path}: {name}: not expected in a session of this model")
    leaves = []
    for name, leaf in template.items():
        rows = {1: live[name]} if name in live else {}
        shape = tuple(rows.get(axis, n) for axis, n in enumerate(leaf.shape))
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (shape, leaf.dtype):
            what = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise FileError(
                f"{path}: {name}: expected {leaf.dtype} {shape}, found {what}"
            )
        whole = np.zeros(leaf.shape, leaf.dtype)
        whole[tuple(slice(n) for n in shape)] = found
        # A copy of jax's own: numpy's memory could not be donated.
        leaves.append(jnp.array(whole))
    return leaves


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the arrays of a file in which no bit was changed."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise FileError(f"{path}: expected a saved session, found other data")
            header = json.loads(header)
            version = header.get("version") if isinstance(header, dict) else None
            if version != VERSION:
                raise FileError(
                    f"{path}: expected a session of version {VERSION}, found "
                    f"{version!r:.20}"
                )
            _check_bytes(Path(path))
            names = file.keys()
            return header, {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise FileError(
            f"{path}: expected a saved session, found a damaged or other file ({error})"
        ) from error


def _check_bytes(path: Path):
    with path.open("rb") as file:
        at, expected = _checksum(file)
        file.seek(at)
        if file.read(_CHECKSUM_DIGITS) != expected.encode():
            raise FileError(f"{path}: damaged: its checksum is not that of its bytes")


def _checksum(file: BinaryIO) -> tuple[int, str]:
    """Return where a file's checksum is, and what it should be."""
    size = file.read(8)
    head = file.read(int.from_bytes(size, "little"))
    before, mark, after = head.partition(_CHECKSUM_MARK)
    digest = hashlib.sha256(size + before + mark + after[_CHECKSUM_DIGITS:])
    while chunk := file.read(2**20):
        digest.update(chunk)
    return len(size + before + mark), digest.hexdigest()


def _check_model(
    path: str | Path, header: dict[str, Any], model: Model, decoding: Decoding
):
    # As JSON has it: no tuples.
    config = json.loads(json.dumps(dataclasses.asdict(model.config)))
    for name in sorted(config.keys() | header["config"].keys()):
        saved, own = header["config"].get(name), config.get(name)
        if saved != own:
            raise ConfigError(f"{name}: {path} has {saved!r}, the model has {own!r}")
    if header["mtp"] is None and decoding.mode.depth:
        raise ConfigError(
            f"depth: expected 0 for {path}, which has no state of an MTP head, found "
            f"{decoding.mode.depth}"
        )
    if header["mtp"] is not None and not model.mtp:
        raise ConfigError(
            f"mtp: {path} has the state of an MTP head, the model has no head"
        )
    parts = {"trunk": model.trunk} | ({"mtp": model.mtp} if header["mtp"] else {})
    for part, weights in parts.items():
        found, own = header[part], fingerprint(weights)
        if found != own:
            raise FileError(
                f"{path}: of another model: its {part} weights have the fingerprint "
                f"{found[:12]}, this model's {own[:12]}"
            )
