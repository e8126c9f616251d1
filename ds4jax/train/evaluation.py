"""How well a model predicts held-out text, and how often the trunk takes its drafts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ds4jax.decode import driver
from ds4jax.model.deepseek import Model
from ds4jax.tokenizer import Tokenizer
from ds4jax.train.corpus import Tokens
from ds4jax.train.data import CopyPrompt
from ds4jax.train.loss import nats


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model made of some text, the true text standing before each token.

    Attributes:
      tokens: how many the trunk predicted.
      size: their bytes of UTF-8.
      trunk: mean nats per token of the trunk.
      mtp: mean nats per token of the MTP head, which does not see the last one before.
      accepted: share of the tokens for which the best guess of the head, paired as it
        is trained, (h_p, t_{p+1}), is the trunk's.
      accepted_ds4: the same under ds4's pairing, (h_p, t_p).
    """

    tokens: int
    size: int
    trunk: float
    mtp: float
    accepted: float
    accepted_ds4: float

    @property
    def bits_per_byte(self) -> float:
        """Return the trunk's bits for each byte of the text."""
        return self.trunk * self.tokens / math.log(2) / self.size


@jax.jit
def _measure(
    model: Model,
    windows: Int[Array, "B width"],
    first: Int[Array, "B"],
    stop: Int[Array, "B"],
) -> Float[Array, "6"]:
    """Return sums over the counted tokens of each window.

    Counted are tokens `first` to `stop`, exclusive; the trunk predicts those of them
    at 1 .. rows, the head those at 2 .. rows + 1.  The sums: the trunk's nats, its
    tokens, the head's nats, its tokens, agreements as trained (of the head's tokens),
    agreements under ds4's pairing (of the trunk's).
    """
    network = model.modules()
    assert network.mtp is not None
    rows = windows.shape[1] - 2
    read, following = windows[:, : rows + 1], windows[:, 1:]
    out = network.trunk(read)
    ahead = network.mtp(network.trunk, following[:, :rows], out.streams[:, :rows])
    beside = network.mtp(network.trunk, read, out.streams)
    best = lambda logits: jnp.argmax(logits, axis=-1)  # noqa: E731
    chosen = best(out.logits)
    counted = lambda at: (at >= first[:, None]) & (at < stop[:, None])  # noqa: E731
    by_trunk = counted(jnp.arange(1, rows + 1))
    by_head = counted(jnp.arange(2, rows + 2))
    return jnp.stack(
        [
            jnp.sum(by_trunk * nats(out.logits, following)[:, :rows]),
            jnp.sum(by_trunk, dtype=jnp.float32),
            jnp.sum(by_head * nats(ahead.logits, following[:, 1:])),
            jnp.sum(by_head, dtype=jnp.float32),
            jnp.sum(by_head & (best(ahead.logits) == chosen[:, 1:]), dtype=jnp.float32),
            jnp.sum(
                by_trunk & (best(beside.logits) == chosen)[:, :rows], dtype=jnp.float32
            ),
        ]
    )


def _score(
    model: Model,
    tokenizer: Tokenizer,
    windows: Int[np.ndarray, "N width"],
    first: Int[np.ndarray, "N"],
    stop: Int[np.ndarray, "N"],
    batch: int,
) -> Score:
    at = np.arange(windows.shape[1])
    counted = (
        (at >= np.maximum(first, 1)[:, None]) & (at < stop[:, None]) & (at < at[-1])
    )
    sizes = np.array([len(piece) for piece in tokenizer.token_bytes])
    sizes[[tokenizer.bos, tokenizer.eos]] = 0
    empty = -len(windows) % batch
    pad = lambda x: np.pad(x, [(0, empty)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
    parts = [np.split(pad(x).astype(np.int32), len(pad(x)) // batch)
             for x in (windows, first, stop)]  # fmt: skip
    total = np.zeros(6)
    for part in tqdm(zip(*parts, strict=True), total=len(parts[0]), disable=None):
        total += np.asarray(_measure(model, *part))
    trunk, tokens, mtp, head_tokens, trained, ds4 = total
    return Score(
        tokens=int(tokens),
        size=int(sizes[windows][counted].sum()),
        trunk=trunk / tokens,
        mtp=mtp / head_tokens,
        accepted=trained / head_tokens,
        accepted_ds4=ds4 / tokens,
    )


def score_text(
    model: Model,
    tokenizer: Tokenizer,
    tokens: Tokens,
    rows: int,
    batch: int,
    windows: int | None = None,
) -> Score:
    """Score a text in windows that share no row, each read from its start.

    Args:
      model: with an MTP head.
      tokenizer: the model's.
      tokens: three or more; all but the first of each window are predicted.
      rows: of a window.
      batch: windows of a pass.
      windows: how many to score at most, evenly spread; all by default.
    """
    starts = np.arange(0, tokens.size - 1, rows)
    if windows is not None and windows < starts.size:
        starts = starts[np.linspace(0, starts.size - 1, windows).astype(int)]
    padded = np.pad(tokens.astype(np.int32), (0, rows + 2))
    texts = padded[starts[:, None] + np.arange(rows + 2)]
    return _score(
        model, tokenizer, texts, np.ones_like(starts), tokens.size - starts, batch
    )


def score_copies(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[CopyPrompt],
    rows: int,
    batch: int,
) -> Score:
    """Score what is to be copied.

    Prompt and continuation must fit a window of `rows + 2`.
    """
    texts = [np.concatenate(prompt) for prompt in prompts]
    windows = np.stack([np.pad(t, (0, rows + 2 - t.size)) for t in texts])
    first = np.array([len(prompt[0]) for prompt in prompts])
    stop = np.array([text.size for text in texts])
    return _score(model, tokenizer, windows, first, stop, batch)


def decode(
    model: Model, prompts: Sequence[Int[np.ndarray, " n"]], max_tokens: int
) -> dict[str, int]:
    """Decode from each prompt, continuously at depth 1, and add up the counters."""
    total: dict[str, int] = {}
    for prompt in tqdm(prompts, unit="prompt", disable=None):
        carry = driver.start(model, prompt.tolist(), max_tokens)
        for name, count in driver.run(model, carry).statistics.of().items():
            total[name] = total.get(name, 0) + count
    return total
