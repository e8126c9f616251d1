"""What training makes small, and what it steers by hand: the balance of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ds4jax.model.deepseek import Model
from ds4jax.train.indexing import indexer_loss

BALANCE_RATE = 1e-3
"""How far one step moves a selection bias (DeepSeek-V3: 0.001)."""

_BIAS = "exp_probs_b.bias"


@struct.dataclass
@no_type_check
class Losses:
    """What one batch measured.

    Attributes:
      trunk: mean nats per next token.
      mtp: mean nats per token after the next.
      indexer: mean nats per query, see `indexer_loss`; 0 without CSA layers.
      loads: by the name of its selection bias, the share of the choices that went to
        each expert of a layer, [E]; hash-routed layers have no bias.
    """

    trunk: Float[Array, ""]
    mtp: Float[Array, ""]
    indexer: Float[Array, ""]
    loads: dict[str, Array]


def nats(
    logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Return minus the log-probability of each target."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def losses(
    model: Model, windows: Int[Array, "B width"], mtp_weight: float
) -> tuple[Float[Array, ""], Losses]:
    """Return what the gradient is taken of, and its parts.

    Args:
      model: float weights.
      windows: T + 2 tokens each: the trunk reads T, and at row p guesses token p + 1;
        the head is paired as it is trained, (h_p, t_{p+1}), and guesses token p + 2.
      mtp_weight: of the head's loss, beside 1 for the trunk's and the indexers'.
    """
    network = model.modules()
    assert network.mtp is not None
    rows = windows.shape[1] - 2
    out = network.trunk(windows[:, :rows])
    ahead = network.mtp(network.trunk, windows[:, 1 : rows + 1], out.streams)
    trunk = jnp.mean(nats(out.logits, windows[:, 1 : rows + 1]))
    mtp = jnp.mean(nats(ahead.logits, windows[:, 2:]))
    indexer = sum(
        (
            indexer_loss(layer, streams)
            for layer, streams in zip(
                network.trunk.layers, out.trace.streams[:-1], strict=True
            )
            if hasattr(layer.attention, "indexer")
        ),
        start=jnp.zeros(()),
    )
    chosen = {f"blk.{i}.{_BIAS}": e for i, e in enumerate(out.trace.experts)}
    chosen[f"mtp.0.{_BIAS}"] = ahead.experts
    loads = {
        name: jnp.bincount(chosen[name].reshape(-1), length=model.config.experts)
        / chosen[name].size
        for name in (*model.trunk, *model.mtp)
        if name.endswith(_BIAS)
    }
    total = trunk + mtp_weight * mtp + indexer
    return total, Losses(trunk, mtp, indexer, loads)


def balanced(
    biases: Mapping[str, Float[Array, "E"]], loads: Mapping[str, Float[Array, "E"]]
) -> dict[str, Float[Array, "E"]]:
    """Move every selection bias towards even loads, with no loss of its own.

    An expert with less than the mean load becomes likelier, one with more less
    (auxiliary-loss-free balancing, DeepSeek-V3 §2.1.2).
    """
    return {
        name: bias + BALANCE_RATE * jnp.sign(jnp.mean(loads[name]) - loads[name])
        for name, bias in biases.items()
    }
