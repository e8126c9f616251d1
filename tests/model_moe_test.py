"""The MoE by itself: who is chosen, what they weigh, and their sum, in float64."""

import hopper
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from expert_tiles_test import moe as packed_moe
from parts import ULPS, close, normal, part, plain, same, sigmoid

from ds4jax.model.moe import MoE
from ds4jax.pallas.passes import DecodePass, within
from ds4jax.pallas.swiglu import Swiglu
from ds4jax.quant import dequantize

ROUTER = models.micro_config(hidden=6)
"""Of 6 experts and as many channels: an identity router takes a row as its logits."""


def router(hashed: bool, bias: np.ndarray | None = None) -> MoE:
    weights = part(ROUTER, "blk.0." if hashed else "blk.1.")
    weights["ffn_gate_inp.weight"] = jnp.eye(6)
    weights["exp_probs_b.bias"] = jnp.zeros(6) if bias is None else bias
    return MoE(ROUTER, hashed, weights)


def route(moe: MoE, logits, token: int = 0):
    x = jnp.asarray(logits, jnp.float32).reshape(1, 1, 6)
    chosen, share = moe.route(x, jnp.array([[token]]))
    return chosen.reshape(-1).tolist(), np.asarray(share).reshape(-1)


def prob(logits) -> np.ndarray:
    return np.sqrt(np.log1p(np.exp(np.asarray(logits, np.float64))))


def test_equal_experts_are_taken_from_the_lowest():
    assert route(router(False), [1, 1, 1, 1, 1, 1])[0] == [0, 1]
    assert route(router(False), [0, 2, 1, 2, 2, 0])[0] == [1, 3]
    assert route(router(False), [0, 1, 1, 3, 1, 1])[0] == [3, 1]


def test_the_bias_selects_and_does_not_weigh():
    bias = np.array([0, 0, 5, 0, 9, 0], np.float32)
    logits = [3, 2, -1, 0, -2, 1]
    chosen, share = route(router(False, bias), logits)
    assert chosen == [4, 2]
    picked = prob(logits)[chosen]
    close(share, ROUTER.routed_scale * picked / picked.sum())
    assert share[0] < share[1]


def test_a_hash_layer_takes_its_experts_from_the_token():
    moe = router(True)
    table = np.asarray(part(ROUTER, "blk.0.")["ffn_gate_tid2eid.weight"])
    assert len({tuple(row) for row in table[:9]}) > 4
    logits = np.array([3, 2, -1, 0, -2, 1])
    for token in range(9):
        chosen, share = route(moe, logits, token)
        same(chosen, table[token])
        picked = prob(logits)[chosen]
        close(share, ROUTER.routed_scale * picked / picked.sum())


def test_the_denominator_is_at_least_two_to_the_minus_14():
    logits = [-40, -50, -60, -60, -60, -60]
    chosen, share = route(router(False), logits)
    picked = prob(logits)[chosen]
    assert picked.sum() < 2.0**-14
    np.testing.assert_allclose(share, 1.5 * picked * 2.0**14, rtol=1e-5)


def test_only_the_gate_is_free_below():
    gate = jnp.array([-20.0, -20.0, 3.0, 30.0, 30.0, 1.0])
    up = jnp.array([1.0, 30.0, -30.0, 2.0, 30.0, -3.0])
    silu = lambda x: x * sigmoid(np.asarray(x, np.float64))  # noqa: E731
    expected = silu(np.array([-20, -20, 3, 10, 10, 1])) * [1, 10, -10, 2, 10, -3]
    found = Swiglu(10.0)(gate, up)
    np.testing.assert_allclose(found, expected, rtol=ULPS)


@pytest.mark.parametrize("experts, width", [(6, 8), (40, 8), (40, 33)])
def test_experts_sum_whether_few_or_all_are_computed(experts, width):
    """In decode passes of many experts only the chosen are read."""
    config = models.micro_config(experts=experts)
    w, x = part(config, "blk.1."), normal(6, 1, width, 64)
    moe = MoE(config, False, w)
    (shared, routed), chosen = jax.jit(moe)(x, jnp.zeros((1, width), jnp.int32))
    found = shared + routed
    _, share = moe.route(x, jnp.zeros((1, width), jnp.int32))

    def expert(row, gate, up, down):
        g, u = np.minimum(gate @ row, 1.5), np.clip(up @ row, -1.5, 1.5)
        return down @ (g * sigmoid(g) * u)

    w, names = plain(w), ("ffn_gate", "ffn_up", "ffn_down")
    for t, row in enumerate(np.asarray(x, np.float64)[0]):
        expected = expert(row, *(w[f"{n}_shexp.weight"] for n in names))
        for e, weight in zip(chosen[0, t], np.asarray(share)[0, t], strict=True):
            expected += weight * expert(row, *(w[f"{n}_exps.weight"][e] for n in names))
        close(found[0, t], expected)


def output(moe, x):
    (shared, routed), _ = moe(x, jnp.zeros(x.shape[:2], jnp.int32))
    return (shared + routed)[0]


@pytest.mark.parametrize("experts", [6, 40])
def test_an_experts_row_does_not_depend_on_its_neighbours(experts):
    """The row contract of both ways, in passes of 8 rows; bit for bit."""
    config = models.micro_config(experts=experts)
    moe, x = MoE(config, False, part(config, "blk.1.")), normal(7, 1, 8, 64)
    run = jax.jit(lambda x: output(moe, x))
    expected = run(x)
    for shift in range(1, 8):
        same(run(jnp.roll(x, shift, axis=1)), jnp.roll(expected, shift, axis=0))
        alone = run(jnp.where(jnp.arange(8)[:, None] == shift, x, 100 * x))
        same(alone[shift], expected[shift])


@pytest.mark.parametrize("experts", [6, 40])
def test_a_decode_pass_multiplies_its_own_rows_experts_only(experts):
    """Row by row, the same bits for any number of rows; a copy gets its row's."""
    config = models.micro_config(experts=experts)
    moe, x = MoE(config, False, part(config, "blk.1.")), normal(7, 1, 8, 64)

    @jax.jit
    def run(x, own):
        with within(DecodePass(8, own)):
            return output(moe, x)

    expected = run(x, jnp.int32(8))
    close(expected, output(moe, x))
    for own in range(1, 9):
        beyond = jnp.arange(8)[:, None] >= own
        spoilt = run(jnp.where(beyond, 100 * x, x), jnp.int32(own))
        same(spoilt[:own], expected[:own])
        copied = run(jnp.where(beyond, x[:, own - 1], x), jnp.int32(own))
        same(copied[own:], jnp.repeat(expected[own - 1][None], 8 - own, 0))


def test_routed_experts_have_their_kernels_whatever_the_shared_one_is():
    """In a decode pass on a GPU; seen red when both had to have some."""
    block, x = packed_moe(), normal(8, 1, 8, 512)

    def lowered() -> str:
        def run(x):
            with within(DecodePass(1, jnp.int32(1))):
                return output(block, x)

        return hopper.lowered(run, x)

    assert all(name in lowered() for name in ("iq2_xxs_gated", "q2_k_"))
    weight = block.shared_down.weight
    weight.set_value(jnp.asarray(dequantize(weight.get_value()), jnp.bfloat16))
    assert all(name in lowered() for name in ("iq2_xxs_gated", "q2_k_"))
