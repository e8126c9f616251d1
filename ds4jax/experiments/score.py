"""Write the logits and streams that a model gives a known text, to compare engines.

The text is read as it stands (teacher forcing), and --out gets float32 arrays of numpy:

    logits      [T, V]     after each of the T tokens
    streams     [T, M, D]  of the trunk, after its last layer
    mtp_logits  [N, V]     of the MTP head, where there is one: N = T - 1 pairs of a
                           token's streams with the token after (--pairing=trained), or
                           N = T pairs with the token itself (--pairing=ds4)

Example:
    ds4jax score --tokens=1,2,3 --out=scores.npz
    ds4jax score --gguf=ds4flash.gguf --tokens=@ids.txt --kv_rounding=ds4 --out=x.npz
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ds4jax.decode.modes import PREFILL_CHUNK
from ds4jax.errors import ConfigError
from ds4jax.experiments import model_flags, token_flags
from ds4jax.files import check_place, replacing
from ds4jax.model import cache
from ds4jax.model.cache import Cache
from ds4jax.model.deepseek import Model
from ds4jax.train.loss import nats

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(token_flags)
flags.mark_flag_as_required(token_flags.TOKENS)
_OUT = flags.DEFINE_string("out", None, "File to write, an npz.", required=True)
_PAIRING = flags.DEFINE_enum(
    "pairing", "trained", ["trained", "ds4"], "Which token joins a row of the head."
)
_KV_ROUNDING = flags.DEFINE_enum(
    "kv_rounding", "none", ["none", "ds4"], "Rounding of cached rows to simulate."
)


class Caches(NamedTuple):
    """State of the trunk, and of the MTP head or None."""

    trunk: Cache
    mtp: Cache | None


def main(argv: Sequence[str]):
    """Score the text that the flags name.

    Raises:
      FileError, ConfigError, TokenError: for a flag or file that cannot be used.
      CapacityError: if the model or the text does not fit in memory.
    """
    del argv
    out = Path(_OUT.value)
    check_place(out)
    tokens = token_flags.read_ids()
    if _PAIRING.value == "ds4" and not model_flags.mtp_path():
        raise ConfigError("--pairing=ds4: needs an MTP file to pair for; see --mtp")
    with model_flags.within_memory():
        model = model_flags.load(kv_rounding=_KV_ROUNDING.value)
        token_flags.check_ids(tokens, model.config.vocab)
        arrays, mean = score(model, tokens, _PAIRING.value)
    with replacing(out) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    shapes = (f"{k} {'x'.join(map(str, x.shape))}" for k, x in arrays.items())
    print(
        f"{out}: {len(tokens)} tokens, {mean:.4f} nats per token;"
        f" {', '.join(shapes)}; {out.stat().st_size:,} bytes"
    )


def score(
    model: Model, tokens: Sequence[int], pairing: str
) -> tuple[dict[str, np.ndarray], float]:
    """Run a text through the model, a chunk at a time.

    Args:
      model: the model, with or without a head.
      tokens: T ids of its vocabulary, at least one.
      pairing: of the head, `trained` or `ds4`.

    Returns:
      The arrays of the module's docstring, by name; and the mean nats of the trunk's
      T - 1 predictions, NaN if there is none.
    """
    config, total = model.config, len(tokens)
    filled = -(-total // PREFILL_CHUNK) * PREFILL_CHUNK
    text = np.zeros((1, filled + 1), np.int32)
    text[0, :total] = tokens
    following = text[:, 1:]
    joined = text if pairing == "ds4" else following
    pairs = total if pairing == "ds4" else total - 1
    arrays = {
        "logits": np.empty((total, config.vocab), np.float32),
        "streams": np.empty((total, config.hc_streams, config.hidden), np.float32),
    }
    caches = Caches(cache.empty(config, filled), None)
    if model.mtp:
        arrays["mtp_logits"] = np.empty((pairs, config.vocab), np.float32)
        caches = caches._replace(mtp=cache.empty(config, filled, ratios=(0,)))
    surprise = 0.0
    for at in tqdm(range(0, total, PREFILL_CHUNK), unit="chunk", disable=None):
        here = slice(at, at + PREFILL_CHUNK)
        count, paired = (
            np.array([min(n - at, PREFILL_CHUNK)], np.int32) for n in (total, pairs)
        )
        caches, rows, missed = _run_chunk(
            model,
            caches,
            text[:, here],
            following[:, here],
            joined[:, here],
            count,
            paired,
        )
        for name, found in rows.items():
            place = arrays[name][here]
            place[:] = np.asarray(found)[0, : len(place)]
        surprise += float(np.asarray(missed)[0, : total - 1 - at].sum())
    return arrays, surprise / (total - 1) if total > 1 else float("nan")


@functools.partial(jax.jit, donate_argnames="caches")
def _run_chunk(
    model: Model,
    caches: Caches,
    chunk: Int[Array, "B T"],
    following: Int[Array, "B T"],
    joined: Int[Array, "B T"],
    count: Int[Array, "B"],
    paired: Int[Array, "B"],
) -> tuple[Caches, dict[str, Array], Float[Array, "B T"]]:
    """Run the next chunk of a text.

    Args:
      model: the model.
      caches: the state before.
      chunk: the tokens, of which the first `count` are real.
      following: the token after each.
      joined: the token that the head gets with the streams of each.
      count: how many tokens.
      paired: how many pairs.

    Returns:
      The state after, the rows by their arrays' names, and the nats of `following`.
    """
    modules = model.modules()
    out = modules.trunk(chunk, caches.trunk, count)
    assert out.cache is not None
    rows, after = {"logits": out.logits, "streams": out.streams}, None
    if modules.mtp:
        head = modules.mtp(modules.trunk, joined, out.streams, caches.mtp, paired)
        rows["mtp_logits"], after = head.logits, head.cache
    return Caches(out.cache, after), rows, nats(out.logits, following)
