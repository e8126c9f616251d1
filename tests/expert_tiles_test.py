"""Many rows by the experts they chose: sorted into tiles, multiplied, interpreted.

`gpu_test.py` has what only a GPU can show.
"""

import functools

import hopper
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_matmul_test import check

from ds4jax import schema, synthetic
from ds4jax.config import ModelConfig, QuantPlan
from ds4jax.model.layers import scope
from ds4jax.model.moe import MoE
from ds4jax.pallas import expert_tiles
from ds4jax.pallas.passes import Prefill, within
from ds4jax.pallas.tile_formats import FORMATS

IN, OUT, EXPERTS, USED, ROWS, TILE = 512, 32, 6, 2, 40, 16
ROUNDED = 2.0**-8
"""Of the largest result: hidden values are rounded to bfloat16 after sums whose order
differs, so a few of them are a bit of 2^-8 apart."""
same = np.testing.assert_array_equal
rng = np.random.default_rng(0)
CHOICES = {
    "some": rng.integers(EXPERTS, size=(ROWS, USED)),
    "nobody's": np.stack([np.full(ROWS, 1), rng.integers(3, 5, ROWS)], 1),
    "everybody's": np.stack([np.full(ROWS, 5), rng.integers(0, 5, ROWS)], 1),
}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("which", CHOICES)
def test_every_pair_has_a_place_in_a_tile_of_its_expert(which):
    chosen = CHOICES[which]
    tiles = expert_tiles.sort(jnp.asarray(chosen), EXPERTS, TILE)
    place, count = np.asarray(tiles.place), int(tiles.count[0])
    same(np.asarray(tiles.source)[place], np.arange(ROWS)[:, None].repeat(USED, 1))
    same(np.asarray(tiles.expert)[place // TILE], chosen)
    assert len(np.unique(place)) == place.size
    sizes = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    assert place.max() // TILE < count == sum(-(-sizes // TILE)) <= len(tiles.expert)


@pytest.mark.parametrize("name", FORMATS)
def test_product(name):
    """Seen red with columns in another order, and with weights of the step before."""
    x, chosen = normal(ROWS, IN), jnp.asarray(CHOICES["everybody's"])
    w = synthetic.blocks(jax.random.key(2), name, (EXPERTS, OUT, IN))
    assert expert_tiles.serves(w)
    tiles = expert_tiles.sort(chosen, EXPERTS, TILE)
    found = expert_tiles.product(x, w, tiles, interpret=True)
    of_chosen = jax.tree.map(lambda plane: plane[chosen], w)
    check(found[tiles.place], "ti,tuoi->tuo", x, of_chosen, "bfloat16")


@pytest.mark.parametrize("names", [("IQ2_XXS", "IQ2_XXS"), ("IQ2_XXS", "Q2_K")])
def test_gate_and_up(names):
    """In one launch and in two.  Seen red with the two in each other's place."""
    x, chosen = normal(ROWS, IN), jnp.asarray(CHOICES["some"])
    gate, up = (
        synthetic.blocks(jax.random.key(seed), name, (EXPERTS, OUT, IN))
        for seed, name in enumerate(names)
    )
    tiles = expert_tiles.sort(chosen, EXPERTS, TILE)
    args = x, gate, up, tiles, lambda gate, up: jnp.tanh(gate) * up
    found = expert_tiles.gated(*args, interpret=True)[tiles.place]
    assert found.dtype == jnp.bfloat16
    alone = (expert_tiles.product(x, w, tiles, interpret=True) for w in (gate, up))
    one, other = (out[tiles.place] for out in alone)
    np.testing.assert_allclose(found, jnp.tanh(one) * other, rtol=ROUNDED, atol=1e-6)


def moe() -> MoE:
    config = ModelConfig.flash(
        layers=1, compress_ratios=(0,), hash_layers=0, hidden=IN, expert_ffn=IN,
        experts=EXPERTS, experts_used=USED, dtype="bfloat16",
    )  # fmt: skip
    types = QuantPlan.named("ds4-q2").types
    weights = {
        name: synthetic.tensor(config, name, spec, types[spec.group])
        for name, spec in schema.trunk(config).items()
        if name.startswith("blk.0.") and ("ffn_" in name or "exp_probs" in name)
    }
    return MoE(config, False, scope(weights, "blk.0."))


def test_the_block_by_tiles_and_by_all_experts(monkeypatch):
    """Seen red with the share of another slot."""
    for name in ("gated", "product"):
        interpreted = functools.partial(getattr(expert_tiles, name), interpret=True)
        monkeypatch.setattr(expert_tiles, name, interpreted)
    block, x = moe(), normal(ROWS, IN)
    share = jnp.abs(normal(ROWS, USED)) + 0.1
    args = x, jnp.asarray(CHOICES["some"]), share
    found, expected = block._by_tiles(*args), block._all(*args)
    worst = ROUNDED * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=worst)


def test_only_a_long_pass_over_a_cache_has_kernels_and_training_a_derivative():
    block, x = moe(), normal(1, ROWS, IN)
    tokens = jnp.zeros((1, ROWS), jnp.int32)

    def total(x):
        shared, routed = block(x, tokens)[0]
        return jnp.sum(shared + routed)

    def lowered(function, kind) -> str:
        with within(kind):
            return hopper.lowered(lambda x: function(x), x)

    assert "expert_tiles" in lowered(total, Prefill())
    assert "expert_tiles" not in lowered(jax.grad(total), None)
