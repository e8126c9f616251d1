"""Mixture of experts: routed by a token table or by the hidden state, and one shared.

Source: ARCHITECTURE §7.  Probabilities are sqrt(softplus); the bias takes part in the
selection only; ties go to the lowest index, as in ds4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ds4jax.config import ModelConfig
from ds4jax.model.hyper import HyperConnection, Update
from ds4jax.model.layers import Linear, RMSNorm, Weights
from ds4jax.pallas import expert_tiles, moe_ptx, passes, router
from ds4jax.pallas.experts import Experts
from ds4jax.pallas.fixed_point import FixedPoint
from ds4jax.pallas.matmul import every_expert_matmul, expert_matmul, experts_in_groups
from ds4jax.pallas.moe import (
    has_kernels,
    has_shared_kernel,
    moe_by_kernel,
    shared_by_kernel,
)
from ds4jax.pallas.passes import by_kernel, by_rows, is_watched, of_prefill
from ds4jax.pallas.router import Router
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

_SMALLEST_TOTAL = 2.0**-14
"""ds4's guard on the denominator of the routing weights."""


class MoE(nnx.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, config: ModelConfig, hashed: bool, weights: Weights):
        linear = lambda name: Linear(weights[name], config.dtype)  # noqa: E731
        self.router = Linear(weights["ffn_gate_inp.weight"])
        if hashed:
            self.table = nnx.Variable(weights["ffn_gate_tid2eid.weight"])
        else:
            self.bias = nnx.Variable(dequantize(weights["exp_probs_b.bias"]))
        self.gate = nnx.Param(weights["ffn_gate_exps.weight"])
        self.up = nnx.Param(weights["ffn_up_exps.weight"])
        self.down = nnx.Param(weights["ffn_down_exps.weight"])
        self.shared_gate = linear("ffn_gate_shexp.weight")
        self.shared_up = linear("ffn_up_shexp.weight")
        self.shared_down = linear("ffn_down_shexp.weight")
        self.hashed = hashed
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        fixed: FixedPoint | None = None,
    ) -> tuple[
        tuple[Float[Array, "B T D"], Float[Array, "B T D"]], Int[Array, "B T U"]
    ]:
        """Return the block's output, as two parts, and the experts each row chose.

        The parts, of the shared expert and of the routed ones, are to be added up: a
        GPU computes them side by side.

        Args:
          x: normed hidden rows.
          tokens: their token ids, which hash routing needs.
          fixed: `x` in fixed point, if something computed that already.
        """
        c, activate = self.config, Swiglu(self.config.swiglu_limit)
        chosen, share = self.route(x, tokens)
        expert, routed = self._shared_stacks(), self._stacks()

        def kernels(width, x, chosen, share):
            return moe_by_kernel(
                x, chosen[0], share[0], routed, expert, self._shared, activate, c.dtype,
                width, fixed,
            )  # fmt: skip

        def shared_kernel(width, x):
            return shared_by_kernel(x, expert, activate, c.dtype, width, fixed)

        def parts(x, chosen, share):
            cuda = shared_kernel if has_shared_kernel(expert) else None
            own = by_kernel(self._shared, x, cuda=cuda)
            return own, by_rows(self._routed, x, chosen, share)

        cuda = kernels if has_kernels(routed) else None
        return by_kernel(parts, x, chosen, share, cuda=cuda), chosen

    def of_streams(
        self,
        connection: HyperConnection,
        norm: RMSNorm,
        streams: Float[Array, "B T M D"],
        update: Update | None,
        tokens: Int[Array, "B T"],
    ) -> tuple[
        tuple[Float[Array, "B T D"], Float[Array, "B T D"]],
        Int[Array, "B T U"],
        Float[Array, "B T M D"],
        Float[Array, "B T M"],
        Float[Array, "B T M M"],
    ]:
        """Return what `connection` and then a call do, where a GPU can in one launch.

        After a call's results come the streams, and `post` and `mix` of the block.

        Args:
          connection: reads the block's input.
          norm: the block's own.
          streams: the residual streams.
          update: what is to be merged into them first, if anything.
          tokens: the rows' ids.
        """

        def apart(streams, update, tokens):
            x, fixed, streams, post, mix = connection(streams, update, norm)
            return *self(x, tokens, *fixed), streams, post, mix

        if not passes.has_kernels():
            return apart(streams, update, tokens)
        activate = Swiglu(self.config.swiglu_limit)
        operands = self._router(), self._stacks(), self._shared_stacks(), activate
        of_row = connection.reading(streams, update, norm)
        programs = moe_ptx.programs(of_row, *operands)

        def together(width, streams, update, tokens):
            ids = self._known(tokens[0]) if self.hashed else None
            of_row = connection.reading(streams, update, norm)
            results = moe_ptx.multiply(of_row, ids, *operands, width, programs)
            own, out, *others = (result[None] for result in results)
            return (own, out), *others

        cuda = together if programs else None
        return by_kernel(apart, streams, update, tokens, cuda=cuda)

    def _shared(self, x):
        gate, up, down = self._shared_linears()
        return down(Swiglu(self.config.swiglu_limit)(gate(x), up(x)))

    def _shared_linears(self):
        return self.shared_gate, self.shared_up, self.shared_down

    def _shared_stacks(self) -> Experts:
        return Experts(*(w.weight.get_value() for w in self._shared_linears()))

    def _router(self) -> Router:
        c, weight = self.config, self.router.weight.get_value()
        bias = None if self.hashed else self.bias.get_value()
        return Router(weight, bias, c.experts_used, c.routed_scale, _SMALLEST_TOTAL)

    def _known(self, tokens):
        """Return the experts of tokens that a table chooses."""
        return jax.tree.map(lambda table: table[tokens], self.table.get_value())

    def _stacks(self) -> Experts:
        return Experts(*(w.get_value() for w in (self.gate, self.up, self.down)))

    def _routed(self, x, chosen, share):
        """Add up each row's chosen experts, whichever way takes less."""
        # Few rows read only their own experts, one copy for each choice; once that
        # is as many as there are, computing them all costs less.  Who watches the
        # products is to learn which rows are an expert's, so these must be few.
        few = chosen.size < self.config.experts or is_watched()
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, share))
        if few:
            found = self._chosen(*rows)
        else:
            is_bfloat16 = self.config.dtype == "bfloat16"
            served = is_bfloat16 and expert_tiles.serves(*self._stacks())
            kernel = self._by_tiles if served else None
            found = of_prefill(self._all, *rows, cuda=kernel)
        return found.reshape(x.shape)

    def route(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]
    ) -> tuple[Int[Array, "B T U"], Float[Array, "B T U"]]:
        """Return the chosen experts, best first, and their weights."""
        logits = of_prefill(self.router, x, cuda=self._logits_by_pieces)
        if self.hashed:
            chosen = self._known(tokens)
            prob = jnp.sqrt(jax.nn.softplus(logits))
            return chosen, self._share(prob, chosen)
        c, bias = self.config, self.bias.get_value()

        def choose(logits):
            prob = jnp.sqrt(jax.nn.softplus(logits))
            _, chosen = jax.lax.top_k(prob + bias, c.experts_used)
            return chosen, self._share(prob, chosen)

        def kernel(width, logits):
            sizes = c.experts_used, c.routed_scale, _SMALLEST_TOTAL
            found = router.choose(logits[0], bias, *sizes, width)
            return tuple(a[None] for a in found)

        cuda = kernel if router.serves(c.experts) else None
        return by_kernel(choose, logits, cuda=cuda)

    def _logits_by_pieces(self, x):
        """Return what the router gives, from operands in pieces of bfloat16.

        Matrix units take those, and six products of them are as exact as float32.
        """
        w = dequantize(self.router.weight.get_value())
        return jnp.einsum(
            "...i,oi->...o", x, w, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
        )

    def _share(self, prob, chosen):
        """Return the weights of the chosen experts."""
        picked = jnp.take_along_axis(prob, chosen, axis=-1)
        total = jnp.sum(picked, axis=-1, keepdims=True)
        total = jnp.maximum(total, _SMALLEST_TOTAL)
        return picked / total * self.config.routed_scale

    def _chosen(self, x, chosen, share):
        """Sum the chosen experts in slot order and no other."""

        def product(x, w):
            return expert_matmul(x, w, chosen, self.config.dtype)

        gate, up, down = self._stacks()
        x, activate = x[:, None], Swiglu(self.config.swiglu_limit)
        hidden = activate(product(x, gate), product(x, up))
        return jnp.sum(share[..., None] * product(hidden, down), axis=1)

    def _by_tiles(self, x, chosen, share):
        """Sort rows by expert, multiply each with its own, and sum in slot order."""
        gate, up, down = self._stacks()
        tiles = expert_tiles.sort(chosen, self.config.experts)
        activation = Swiglu(self.config.swiglu_limit)
        hidden = expert_tiles.gated(x, gate, up, tiles, activation)
        out = expert_tiles.product(hidden, down, tiles, is_sorted=True)
        return jnp.sum(share[..., None] * out[tiles.place], axis=1)

    def _all(self, x, chosen, share):
        """Compute every expert, a group of them at a time, and weigh by choice."""
        c = self.config
        is_chosen = chosen[..., None] == jnp.arange(c.experts)
        weight = jnp.sum(jnp.where(is_chosen, share[..., None], 0), axis=1)
        stacks, groups = [], 1
        for w in self._stacks():
            stack, groups = experts_in_groups(w, c.experts)
            stacks.append(stack)

        def add_group(total, group):
            (gate, up, down), weight = group
            product = lambda x, w: every_expert_matmul(x, w, c.dtype)  # noqa: E731
            hidden = Swiglu(c.swiglu_limit)(product(x, gate), product(x, up))
            part = jnp.sum(weight[..., None] * product(hidden, down), axis=0)
            return total + part, None

        weight = weight.T.reshape(groups, -1, len(x))
        total, _ = jax.lax.scan(add_group, jnp.zeros_like(x), (stacks, weight))
        return total
