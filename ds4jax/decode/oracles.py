"""ds4's oracles of a stream: would plain decoding have committed its tokens?

However a stream was decoded, its tokens are fed to plain decoding from a fresh state,
one row a pass.  A token's gap is how far its logit lies below the greatest one there:
0 where plain decoding chooses it too, or could, two tokens being equally likely.

Source: `--mtp-verify-depth` (antirez/ds4#358) and `--cont-argmax-gap` (#371) are one
measurement of the streams of two modes; `--verify-divergence` (#756) reads the same
gaps without judging them (SPECULATION §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds4jax.decode import driver
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Kind
from ds4jax.errors import CapacityError, ConfigError
from ds4jax.model.cache import Cache
from ds4jax.model.deepseek import Model

TIE_TOLERANCE = 2.0
"""ds4's bound on a gap, in logits, for any class of output: what a near tie can lose to
another order of summation.  The bug of #358 made gaps of about 21."""

EXACT_TOLERANCE = 0.0
"""The bound for modes that keep the row contract: plain's own tokens, all of them."""

MORE_THAN = 128
"""ds4 judges streams of more tokens than this."""

SEVERITIES = (0.0, 0.001, 0.01, 0.1, 0.5, TIE_TOLERANCE)
"""Upper bounds of the buckets of gaps, in logits; one bucket more holds what exceeds
them.  The first holds the gaps of 0; the second, what summing in another order does to
float32; the last, what no tie explains.  ds4 has no bounds to agree with."""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How often a stream leaves plain decoding's choice, and how badly.

    Attributes:
      histogram: tokens per bucket of SEVERITIES; a NaN counts as the most severe.
    """

    histogram: tuple[int, ...]

    @classmethod
    def of(cls, gaps: Float[np.ndarray, "n"]) -> Divergence:
        """Return the divergence of a stream with these gaps."""
        bucket = np.searchsorted(SEVERITIES, gaps)
        counts = np.bincount(bucket, minlength=1 + len(SEVERITIES))
        return cls(tuple(counts.tolist()))

    @property
    def tokens(self) -> int:
        """Return n, the tokens of the stream."""
        return sum(self.histogram)

    @property
    def diverged(self) -> int:
        """Return how many of them are not the most likely token."""
        return sum(self.histogram[1:])

    @property
    def rate(self) -> float:
        """Return the share of them that are not, 0..1."""
        return self.diverged / self.tokens


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What ds4's oracle says of a stream.

    Attributes:
      kind: of the mode of decoding.
      worst: the greatest gap, in logits; NaN if there is a NaN.
      position: of the first token that has it, counted from the prompt's first.
      divergence: of all tokens.
      accepted: drafts among them.
      tolerance: bound on the gaps, in logits.
    """

    kind: Kind
    worst: float
    position: int
    divergence: Divergence
    accepted: int
    tolerance: float

    @property
    def failures(self) -> tuple[str, ...]:
        """Return a line for each of ds4's conditions that does not hold."""
        tokens = self.divergence.tokens
        conditions = {
            f"gaps of at most {self.tolerance:g}, found {self.worst:.4g} at position"
            f" {self.position}": self.worst <= self.tolerance,
            f"more than {MORE_THAN} tokens, found {tokens}": tokens > MORE_THAN,
            "an accepted draft, found none": self.kind == "plain" or self.accepted > 0,
        }
        return tuple(
            f"{self.kind}: expected {line}"
            for line, holds in conditions.items()
            if not holds
        )

    @property
    def passes(self) -> bool:
        """Say whether all of them hold."""
        return not self.failures


def argmax_gaps(
    model: Model,
    tokens: Sequence[int],
    prompt_length: int,
    decoding: Decoding = GREEDY,
    max_context: int | None = None,
) -> Float[np.ndarray, "n"]:
    """Return the gap of every token after the prompt, in logits, at least 0.

    The numeric class is plain decoding's: the driver's prefill, then decode passes, all
    of them in one call on the device.

    Args:
      model: the model; its head is not used.
      tokens: the prompt, and the n >= 1 tokens that were committed after it.
      prompt_length: tokens of the prompt, at least one.
      decoding: of the run that committed them.  Only its prefill is repeated, which
        decides the last bits of the prompt's state.
      max_context: of that run, as of `driver.create`; it decides the shape of a pass,
        and so the last bits as well.  By default what the tokens need, which is the
        same for a run that spent its budget.

    Raises:
      ConfigError: if `prompt_length` leaves no prompt or nothing after it.
      TokenError: if an id is not in the vocabulary.
      CapacityError: if the tokens exceed `max_context`.
    """
    if not 1 <= prompt_length < len(tokens):
        raise ConfigError(
            "prompt_length: expected a prompt and something after it in"
            f" {len(tokens)} tokens, found {prompt_length}"
        )
    driver.check_ids("tokens", tokens, model.config.vocab)
    max_context = max_context or len(tokens)
    if len(tokens) > max_context:
        raise CapacityError(
            f"max_context: expected room for {len(tokens)} tokens, found {max_context}"
        )
    plain = dataclasses.replace(decoding, mode=GREEDY.mode)
    carry = driver.create(model, max_context, plain)
    carry = driver.prefill(model, carry, tokens[:prompt_length], plain)
    # As long as the context, which has few sizes, so that few are compiled.
    text = np.zeros(carry.max_context, np.int32)
    count = len(tokens) - prompt_length
    text[:count] = tokens[prompt_length:]
    gaps = _forced_gaps(model, carry.cache, carry.logits[0], text, np.int32(count))
    return np.asarray(gaps)[:count]


@jax.jit
def _forced_gaps(
    model: Model,
    cache: Cache,
    logits: Float[Array, "V"],
    text: Int[Array, "context"],
    count: Int[Array, ""],
) -> Float[Array, "context"]:
    """Feed the first `count` tokens of `text` to decode passes; return their gaps.

    `cache` and `logits` are of the prompt before.
    """
    trunk = model.modules().trunk

    def gap(logits, token):
        return jnp.max(logits) - logits[token]

    def step(i, state):
        cache, gaps = state
        out = trunk(text[i - 1].reshape(1, 1), cache)
        return out.cache, gaps.at[i].set(gap(out.logits[0, 0], text[i]))

    gaps = jnp.zeros(len(text)).at[0].set(gap(logits, text[0]))
    return jax.lax.fori_loop(1, count, step, (cache, gaps))[1]


def verify_depth(
    model: Model,
    tokens: Sequence[int],
    prompt_length: int,
    decoding: Decoding,
    accepted: int = 0,
    tolerance: float = TIE_TOLERANCE,
    max_context: int | None = None,
) -> Verdict:
    """Judge a stream as ds4's `--mtp-verify-depth` does.

    Args:
      model: as `argmax_gaps`.
      tokens: as `argmax_gaps`.
      prompt_length: as `argmax_gaps`.
      decoding: as `argmax_gaps`.
      accepted: drafts that the run committed.  Unless it was plain there must be one:
        ds4 asks for a cycle of more than one token, without which nothing was at stake.
      tolerance: bound on the gaps; EXACT_TOLERANCE where the row contract is kept.
      max_context: as `argmax_gaps`.

    Raises:
      ConfigError, TokenError, CapacityError: as `argmax_gaps`.
    """
    gaps = argmax_gaps(model, tokens, prompt_length, decoding, max_context)
    at = int(np.argmax(gaps))
    return Verdict(
        kind=decoding.mode.kind,
        worst=float(gaps[at]),
        position=prompt_length + at,
        divergence=Divergence.of(gaps),
        accepted=accepted,
        tolerance=tolerance,
    )


def cont_argmax_gap(
    model: Model,
    tokens: Sequence[int],
    prompt_length: int,
    accepted: int,
    tolerance: float = TIE_TOLERANCE,
    max_context: int | None = None,
) -> Verdict:
    """Judge a continuous stream as ds4's `--cont-argmax-gap` does.

    It is `verify_depth` of the default mode, whatever the depth and the verifier were.
    """
    return verify_depth(
        model, tokens, prompt_length, CONTINUOUS, accepted, tolerance, max_context
    )


def divergence(
    model: Model,
    tokens: Sequence[int],
    prompt_length: int,
    decoding: Decoding = GREEDY,
    max_context: int | None = None,
) -> Divergence:
    """Measure how often and how badly a stream diverges; see `argmax_gaps`."""
    gaps = argmax_gaps(model, tokens, prompt_length, decoding, max_context)
    return Divergence.of(gaps)
