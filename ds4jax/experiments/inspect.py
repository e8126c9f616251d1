"""Tell what is in a GGUF file, and what decoding reads of it.

Only the header is read, so a file of 80 GiB takes seconds.  Of the routed experts a
pass reads those that its rows chose; two rows are taken to choose independently and
uniformly, which real rows do not: they agree more often, and read less.

Example:
    ds4jax inspect ds4flash.gguf --tensors
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from absl import flags

from ds4jax import gguf
from ds4jax.config import ModelConfig
from ds4jax.experiments import footprint
from ds4jax.model import cache

ARGUMENTS = ("FILE",)
_TENSORS = flags.DEFINE_bool("tensors", False, "List every tensor.")
_MAX_CONTEXT = flags.DEFINE_integer(
    "max_context", 32768, "Tokens whose state is measured.", lower_bound=1
)


def main(argv: Sequence[str]):
    """Print the report of one file."""
    print(report(gguf.read(argv[1]), _MAX_CONTEXT.value, list_tensors=_TENSORS.value))


def report(file: gguf.GGUF, max_context: int, *, list_tensors: bool = False) -> str:
    """Return the description of a trunk or MTP file, many lines long.

    An MTP file does not say its architecture, so it gets no table of that, of reads
    and of the state of a sequence of `max_context` tokens.

    Raises:
      FileError, ConfigError: if a file other than an MTP block has no architecture.
    """
    tensors = file.tensors.values()
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    total = sum(sizes.values())
    is_mtp = "mtp.0.norm.weight" in sizes and "token_embd.weight" not in sizes
    config = None if is_mtp else gguf.config(file)
    lines = [
        f"{file.path}: {'MTP block' if is_mtp else 'trunk'}, {len(sizes)} tensors,"
        f" {total:,} bytes ({total / 2**30:.2f} GiB)"
    ]
    if config:
        lines += ["", "architecture", *_architecture(config)]
    lines += ["", "bytes by type", *_shares((t.type, t.nbytes) for t in tensors)]
    groups = [(footprint.group_of(name), size) for name, size in sizes.items()]
    lines += ["", "bytes by group", *_shares(groups)]
    if config:
        lines += ["", "weight bytes that one pass reads", *_reads(sizes, config)]
        title = f"bytes of state of a sequence of up to {max_context:,} tokens"
        lines += ["", title, *_state(config, max_context)]
    if list_tensors:
        lines += ["", "tensors", *map(_line, tensors)]
    return "\n".join(lines)


def _architecture(config: ModelConfig) -> Iterable[str]:
    for name, value in dataclasses.asdict(config).items():
        if name not in ("kv_rounding", "dtype"):  # how it is run, not what it is
            value = " ".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"  {name:22}{value}"


def _shares(items: Iterable[tuple[str, int]]) -> Iterable[str]:
    """Yield count, bytes and share of the whole for each label, largest first."""
    sizes = collections.defaultdict(list)
    for label, size in items:
        sizes[label].append(size)
    total = sum(map(sum, sizes.values()))
    for label, parts in sorted(sizes.items(), key=lambda kv: -sum(kv[1])):
        size = sum(parts)
        yield f"  {label:20}{len(parts):6}{size:19,}{size / total:8.1%}"


def _reads(sizes: dict[str, int], config: ModelConfig) -> Iterable[str]:
    one = footprint.bytes_read(sizes, config, 1)
    for rows, label in ((1, "one row"), (2, "two rows")):
        read = footprint.bytes_read(sizes, config, rows)
        experts = footprint.distinct_experts(config, rows)
        yield (
            f"  {label:20}{read:25,.0f}  x{read / one:.3f}"
            f"  {experts:.4g} of {config.experts} experts a layer"
        )


def _state(config: ModelConfig, max_context: int) -> Iterable[str]:
    for label, mtp in (("trunk", False), ("MTP block", True)):
        yield f"  {label:20}{cache.nbytes(config, max_context, mtp):25,}"


def _line(tensor: gguf.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    return f"  {tensor.name:36}{tensor.type:8}{shape:>16}{tensor.nbytes:17,}"
