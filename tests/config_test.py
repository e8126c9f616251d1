"""Every value that `ModelConfig` refuses, its presets, and the named plans."""

import dataclasses
import math
import re

import numpy as np
import pytest

from ds4jax import schema
from ds4jax.config import ModelConfig, QuantPlan, mtp_plan
from ds4jax.errors import ConfigError

FIELDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
INTEGERS = [name for name, kind in FIELDS.items() if kind == "int"]
FLOATS = [name for name, kind in FIELDS.items() if kind == "float"]
NO_INDEXER = dict(compress_ratios=(0, 0, 16, 128, 16, 128))


def accept(**changes):
    """Validate `tiny` with changes, past the type checker that only tests have."""
    fields = dataclasses.asdict(ModelConfig.tiny()) | changes
    config = object.__new__(ModelConfig)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


def refuse(expected: str, name: str, value, **others):
    """Claim that `name=value` is refused in one line of key, expected and found."""
    message = re.escape(f"{name}: expected {expected}, found {value!r}")
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        accept(**{name: value}, **others)
    assert "\n" not in str(caught.value)


def test_every_field_has_a_rule():
    others = {"compress_ratios", "kv_rounding", "dtype"}
    assert {*INTEGERS, *FLOATS} | others == FIELDS.keys()
    assert (len(INTEGERS), len(FLOATS)) == (21, 9)


NOT_INTEGERS = [-1, 4.0, math.nan, "4", None, True, np.int32(4), (4,), "4\n4"]
NOT_FLOATS = [0, 0.0, -0.5, -1, math.nan, math.inf, -math.inf, "1.0", None, 1j, "1\n"]


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_non_negative_ints(name):
    for value in NOT_INTEGERS:
        refuse("a non-negative integer", name, value)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_positive_and_finite(name):
    for value in NOT_FLOATS:
        refuse("a positive number", name, value)


def test_a_truth_value_is_not_a_number():
    for name in FLOATS:
        refuse("a positive number", name, True)


def test_an_integer_beyond_all_floats_is_not_finite():
    for name in FLOATS:
        refuse("a positive number", name, 10**400)


def test_floats_may_be_written_as_integers():
    accept(**dict.fromkeys(FLOATS, 3))


POSITIVE = (
    "vocab hidden layers heads head_dim q_lora o_lora o_groups window experts "
    "experts_used expert_ffn hc_streams sinkhorn_iters"
).split()


@pytest.mark.parametrize("name", POSITIVE)
def test_sizes_are_at_least_one(name):
    refuse("at least 1", name, 0)


def test_yarn_has_a_context_and_a_base():
    """The ramp divides by the logarithm of the base, and takes one of the context."""
    refuse("at least 1", "yarn_original_context", 0)
    with pytest.raises(ConfigError, match="^compress_rope_theta: .*, found 1.0$"):
        accept(compress_rope_theta=1.0)


@pytest.mark.parametrize(
    "value",
    [
        (), (0, 0, 4, 128, 4), (0, 0, 4, 128, 4, 128, 4), (0, 0, 4, 128, 4, -1),
        (0, 0, 4, 128, 4, 128.0), (False, 0, 4, 128, 4, 128), "004848", None, 6,
        [0, 0, 4, 128, 4, 128],  # jit needs a static argument that can be hashed
        dict.fromkeys(range(5, 11)),
    ],
    ids=repr,
)  # fmt: skip
def test_one_compress_ratio_per_layer_in_a_tuple(value):
    # What is expected may say more, for instance that it has to be a tuple.
    shown = re.escape(f"found {value!r}")
    with pytest.raises(ConfigError, match=f"^compress_ratios: expected .*6.*{shown}$"):
        accept(compress_ratios=value)


@pytest.mark.parametrize("value", [0, 1, 63, 130])
def test_rotary_channels_are_pairs_within_a_head(value):
    refuse("an even number in 2..128", "rope_dim", value)
    accept(rope_dim=128)


def test_output_groups_divide_the_heads():
    refuse("a divisor of 8", "o_groups", 3)
    refuse("a divisor of 8", "o_groups", 16)


def test_no_more_experts_are_used_than_there_are():
    refuse("<= 12", "experts_used", 13)
    accept(experts_used=12)


def test_no_more_layers_are_hash_routed_than_there_are():
    refuse("<= layers", "hash_layers", 7)
    accept(hash_layers=6)
    accept(hash_layers=0)


@pytest.mark.parametrize("value", [0, 2])
def test_there_is_one_shared_expert(value):
    refuse("1", "shared_experts", value)


@pytest.mark.parametrize("value", ["fp8", "", None, True, ["ds4"]])
def test_rounding_is_one_of_two(value):
    refuse("'none' or 'ds4'", "kv_rounding", value)


@pytest.mark.parametrize("value", ["float16", "F32", None, np.float32, ["float32"]])
def test_dtype_is_one_of_two(value):
    refuse("'float32' or 'bfloat16'", "dtype", value)
    accept(dtype="bfloat16")


@pytest.mark.parametrize("name", ["index_heads", "index_topk"])
def test_a_csa_layer_needs_an_indexer(name):
    refuse("at least 1", name, 0)
    accept(**{name: 0}, **NO_INDEXER)


def test_an_index_key_holds_the_rotary_channels():
    refuse("at least rope_dim = 64", "index_dim", 63)
    accept(index_dim=64)
    accept(index_dim=0, **NO_INDEXER)


def test_ds4s_rounding_needs_whole_fp8_blocks():
    expected = "head_dim - rope_dim a multiple of 64 (FP8 blocks of kv_rounding=ds4)"
    refuse(expected, "head_dim", 96, kv_rounding="ds4")
    accept(head_dim=96)
    accept(head_dim=192, kv_rounding="ds4")


@pytest.mark.parametrize("value", [96, 16])
def test_ds4s_rounding_needs_an_index_of_a_power_of_two(value):
    expected = "a power of two >= 32 (Hadamard and FP4 of kv_rounding=ds4)"
    changes = dict(head_dim=80, rope_dim=16)
    refuse(expected, "index_dim", value, kv_rounding="ds4", **changes)
    accept(index_dim=value, **changes)
    accept(index_dim=value, kv_rounding="ds4", **changes, **NO_INDEXER)


def test_flash_has_the_published_values():
    """ARCHITECTURE §1."""
    flash = {
        "layers": 43, "hidden": 4096, "vocab": 129280,
        "heads": 64, "head_dim": 512, "rope_dim": 64,
        "q_lora": 1024, "o_groups": 8, "o_lora": 1024,
        "experts": 256, "experts_used": 6, "shared_experts": 1, "expert_ffn": 2048,
        "routed_scale": 1.5, "hash_layers": 3, "window": 128,
        "index_heads": 64, "index_dim": 128, "index_topk": 512,
        "hc_streams": 4, "sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_eps": 1e-6,
        "swiglu_limit": 10, "rope_theta": 10000, "compress_rope_theta": 160000,
        "yarn_factor": 16, "yarn_original_context": 65536,
        "yarn_beta_fast": 32, "yarn_beta_slow": 1,
        "compress_ratios": (0, 0, *(4, 128) * 20, 4),
        "kv_rounding": "none", "dtype": "float32",
    }  # fmt: skip
    assert dataclasses.asdict(ModelConfig.flash()) == flash
    ratios = ModelConfig.flash().compress_ratios
    assert [ratios.count(ratio) for ratio in (0, 4, 128)] == [2, 21, 20]


def test_presets_take_changes_and_can_be_hashed():
    changed = ModelConfig.flash(window=7, kv_rounding="ds4")
    assert changed == dataclasses.replace(
        ModelConfig.flash(), window=7, kv_rounding="ds4"
    )
    assert len({ModelConfig.flash(), ModelConfig.flash(), ModelConfig.tiny()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.tiny().window = 3  # pyright: ignore


def test_tiny_has_layers_of_every_kind_and_routers_of_both():
    tiny = ModelConfig.tiny()
    kinds = {(r > 0) + (r == 4) for r in tiny.compress_ratios}
    assert kinds == {0, 1, 2}
    assert 0 < tiny.hash_layers < tiny.layers
    csa = [layer for layer in range(tiny.layers) if tiny.is_csa(layer)]
    assert csa == [i for i, ratio in enumerate(tiny.compress_ratios) if ratio == 4]


def test_every_matrix_of_tiny_holds_whole_blocks_of_every_format():
    """The k-quants' blocks are of 256; ds4 keeps the plain group in F16."""
    tiny = ModelConfig.tiny()
    specs = schema.trunk(tiny) | schema.mtp(tiny)
    widths = {
        name: spec.shape[-1]
        for name, spec in specs.items()
        if spec.group in ("dense", "experts", "down")
    }
    assert len(widths) > 7 * 11
    assert {n: width for n, width in widths.items() if width % 256} == {}


def test_named_plans():
    """ds4's published layouts, from the tables of its files' types."""
    plan = QuantPlan.named
    types = lambda name: dataclasses.astuple(plan(name))  # noqa: E731
    assert types("f32") == ("F32",) * 4
    assert types("f16") == ("F16",) * 4
    assert types("q8_0") == ("Q8_0", "F16", "Q8_0", "Q8_0")
    assert plan("ds4-q2") == QuantPlan(
        dense="Q8_0", plain="F16", experts="IQ2_XXS", down="Q2_K"
    )
    assert types("ds4-q4") == ("Q8_0", "F16", "Q4_K", "Q4_K")
    assert types("mtp-q4") == ("Q8_0", "F32", "Q4_K", "Q4_K")
    assert mtp_plan("ds4-q2") == mtp_plan("ds4-q4") == "mtp-q4"
    assert mtp_plan("q8_0") == "q8_0"
    for name in ("Q8_0", "q4_k", ""):
        message = f"^plan: expected one of f32, f16, q8_0, .*, found {name!r}$"
        with pytest.raises(ConfigError, match=message):
            plan(name)
