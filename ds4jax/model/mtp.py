"""The MTP head: one more layer that guesses the token after the next.

Pairing.  The head is trained on (h_p, t_{p+1}) -> t_{p+2}: the trunk's streams of
position p with the token that follows.  ds4's own drafting pairs h_p with t_p and so
guesses t_{p+1}; `Pairing` makes it a switch (ARCHITECTURE §8).
"""

from __future__ import annotations

from typing import Literal, no_type_check

import jax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig
from ds4jax.model.cache import Cache
from ds4jax.model.hyper import HyperHead
from ds4jax.model.layers import Linear, RMSNorm, Weights, project_normed, scope
from ds4jax.model.trunk import (
    Layer,
    Trunk,
    each_alone,
    fill_up,
    kind_of_pass,
    seal,
    under_contract,
)
from ds4jax.pallas.passes import within

Pairing = Literal["trained", "ds4"]


def pair(
    streams: Float[Array, "B T M D"],
    tokens: Int[Array, "B T"],
    pairing: Pairing = "trained",
) -> tuple[Float[Array, "B N M D"], Int[Array, "B N"]]:
    """Return the (streams, token) inputs of the head for a known text.

    `trained` gives N = T - 1 pairs (h_p, t_{p+1}); `ds4` gives N = T pairs (h_p, t_p).
    """
    if pairing == "ds4":
        return streams, tokens
    return streams[:, :-1], tokens[:, 1:]


@struct.dataclass
@no_type_check
class MTPOutput:
    """Result of a pass of the head.

    Attributes:
      logits: float32 [B, T, V].
      streams: float32 [B, T, M, D] of its layer: `streams` of a recursive next call.
      cache: the state after, or None.
      experts: int32 [B, T, U].
    """

    logits: Float[Array, "B T V"]
    streams: Float[Array, "B T M D"]
    cache: Cache | None
    experts: Int[Array, "B T U"]


class MTPHead(nnx.Module):
    """The MTP block, ds4's `mtp.0.*`; its embedding and LM head are the trunk's."""

    def __init__(self, config: ModelConfig, weights: Weights):
        weights = scope(weights, "mtp.0.")
        self.e_proj = Linear(weights["e_proj.weight"], config.dtype)
        self.h_proj = Linear(weights["h_proj.weight"], config.dtype)
        self.enorm = RMSNorm(weights["enorm.weight"], config.rms_eps)
        self.hnorm = RMSNorm(weights["hnorm.weight"], config.rms_eps)
        self.layer = Layer(config, 0, False, weights)
        self.head = HyperHead(config, scope(weights, "hc_head_"))
        self.norm = RMSNorm(weights["norm.weight"], config.rms_eps)

    def __call__(
        self,
        trunk: Trunk,
        tokens: Int[Array, "B T"],
        streams: Float[Array, "B T M D"],
        cache: Cache | None = None,
        count: Int[Array, "B"] | None = None,
    ) -> MTPOutput:
        """Guess what follows each (streams, token) pair.

        Args:
          trunk: lends its embedding and LM head.
          tokens: the token of each pair.
          streams: the trunk's streams of each pair after the last layer, or this
            head's own when it drafts further ahead.
          cache: the head's state; row i of its ring is the i-th pair of the text, and
            `cache.length` the index of this pass's first.  None as for the trunk.
          count: how many of the T pairs are real, as for the trunk.
        """
        batch, width = tokens.shape
        if batch > 1 and under_contract(width, cache):
            run = lambda *args: self(trunk, *args)  # noqa: E731
            return each_alone(run, tokens, streams, cache, count)
        (tokens, streams), rows = fill_up((tokens, streams), cache, count)
        state = cache and cache.layers[0]
        with within(kind_of_pass(width, rows, cache)):
            embedded = project_normed(trunk.embed(tokens), self.enorm, self.e_proj)
            streams = embedded[:, :, None] + self.h_proj(self.hnorm(streams))
            streams, update, state, experts, _ = self.layer(
                streams, None, tokens, state, rows
            )
            streams = update.merged(streams)
            logits = project_normed(self.head(streams), self.norm, trunk.output)
        cache = None if state is None else Cache((state,), rows.end)
        results, cache = seal(((logits, streams, experts), cache), rows)
        logits, streams, experts = jax.tree.map(lambda x: x[:, :width], results)
        return MTPOutput(logits, streams, cache, experts)
