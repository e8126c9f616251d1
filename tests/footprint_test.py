"""Byte accounting against ds4's own file sizes and per-tensor bytes of Flash."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ds4jax import schema
from ds4jax.config import PLANS, ModelConfig, QuantPlan
from ds4jax.experiments import footprint
from ds4jax.model.deepseek import Model
from ds4jax.pallas.passes import Weight

FLASH = ModelConfig.flash()


def sizes(specs: dict[str, schema.TensorSpec], plan: QuantPlan) -> dict[str, int]:
    """Return the bytes of each tensor of a file with this plan."""
    found = {}
    for name, spec in specs.items():
        ggml_type = GGMLQuantizationType[plan.types[spec.group]]
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
        found[name] = spec.size // block * block_bytes
    return found


Q2 = sizes(schema.trunk(FLASH), PLANS["ds4-q2"])
Q4 = sizes(schema.trunk(FLASH), PLANS["ds4-q4"])
MXFP4 = sizes(schema.trunk(FLASH), QuantPlan("Q8_0", "F16", "MXFP4", "MXFP4"))
MTP = sizes(schema.mtp(FLASH), PLANS["mtp-q4"])


@pytest.mark.parametrize(
    "tensors, count, total",
    [
        (Q2, 1328, 86_714_775_900),
        (Q4, 1328, 164_628_167_004),
        (MXFP4, 1328, 155_971_123_548),
        (MTP, 32, 3_807_600_108),
    ],
)
def test_files_of_flash_have_ds4s_sizes(tensors, count, total):
    groups = footprint.by_group(tensors)
    assert (len(tensors), sum(groups.values())) == (count, total)
    assert footprint.OTHER not in groups


def test_groups_of_the_q2_trunk():
    """Each is a sum of per-tensor bytes, 43 layers of which 21 CSA and 20 HCA."""
    matrix, expert_up, expert_down = 35_651_584, 2_162_688, 2_752_512
    assert footprint.by_group(Q2) == {
        "attention": 43 * (4_456_448 + 3 * matrix + 2_228_224),
        "shared experts": 43 * 3 * 8_912_896,
        "routed experts": 43 * 256 * (2 * expert_up + expert_down),
        "router": 43 * 2_097_152 + 40 * 1_024,
        "hyper connections": 43 * 2 * (786_432 + 12 + 96) + 131_072 + 16 + 4,
        "compressors": 21 * (2 * 8_388_608 + 8_192 + 2_048)
        + 20 * (2 * 4_194_304 + 131_072 + 2_048),
        "indexer": 21 * (16_777_216 + 524_288 + 2 * 2_097_152 + 2_048 + 512),
        "head": 562_626_560,
        "norms and sinks": 43 * (2 * 16_384 + 4_096 + 2_048 + 256) + 16_384,
        "hash table": 3 * 3_102_720,
        "embedding": 1_059_061_760,
    }


def test_groups_of_the_mtp_block():
    groups = footprint.by_group(MTP)
    assert groups["MTP projections"] == 2 * 17_825_792
    assert groups["routed experts"] == 3 * 256 * 4_718_592
    assert groups["norms and sinks"] == 5 * 16_384 + 4_096 + 2_048 + 256


@pytest.mark.parametrize(
    "tensors, one, two", [(Q2, 9.559, 11.342), (Q4, 11.385, 14.952)]
)
def test_reads_of_a_pass(tensors, one, two):
    assert round(footprint.bytes_read(tensors, FLASH, 1) / 1e9, 3) == one
    assert round(footprint.bytes_read(tensors, FLASH, 2) / 1e9, 3) == two


def test_one_row_reads_its_experts_and_one_row_of_each_table():
    groups = footprint.by_group(Q2)
    dense = sum(groups.values()) - sum(
        groups[name] for name in ("routed experts", "hash table", "embedding")
    )
    used = 43 * 6 * (2 * 2_162_688 + 2_752_512)
    rows = 2 * FLASH.hidden + 3 * 4 * FLASH.experts_used
    read = footprint.bytes_read(Q2, FLASH, 1)
    assert read == pytest.approx(dense + used + rows, rel=1e-12)


def test_a_model_on_the_device_reads_what_its_files_hold():
    def empty(sizes: dict[str, int]) -> dict[str, Weight]:
        return {
            name: np.broadcast_to(np.uint8(0), size) for name, size in sizes.items()
        }

    model = Model(empty(Q2), empty(MTP), FLASH)
    assert footprint.pass_bytes(model, 2) == footprint.bytes_read(Q2, FLASH, 2)
    experts = 6 * 3 * 4_718_592
    groups = footprint.by_group(MTP)
    rest = sum(groups.values()) - groups["routed experts"]
    draft = experts + rest + Q2["output.weight"]
    assert footprint.draft_bytes(model) == pytest.approx(draft, rel=1e-12)


def test_distinct_experts_between_agreement_and_disjointness():
    assert footprint.distinct_experts(FLASH, 1) == pytest.approx(6, rel=1e-12)
    assert footprint.distinct_experts(FLASH, 2) == 256 * (1 - (250 / 256) ** 2)
    assert footprint.distinct_experts(FLASH, 10**5) == pytest.approx(256)


def test_what_ds4_does_not_know_is_apart_and_not_read():
    groups = footprint.by_group(Q2 | {"blk.0.attn_rot.weight": 7})
    assert groups[footprint.OTHER] == 7
    assert footprint.bytes_read({"attn_rot.weight": 7}, FLASH, 1) == 0
