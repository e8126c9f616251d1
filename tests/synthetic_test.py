"""Synthetic weights: their layout, size and bits, in a file and on the device."""

import math
import subprocess
import sys

import commands
import jax
import models
import numpy as np
import pytest

from ds4jax import gguf, quant, schema, synthetic
from ds4jax.config import PLANS, ModelConfig, mtp_plan
from ds4jax.errors import ConfigError
from ds4jax.experiments import synth_device
from ds4jax.gguf.loading import find_flaw
from ds4jax.model import deepseek

TYPES = (*quant.FORMATS, "F32", "F16", "BF16")
CONFIG = models.micro_config(
    hidden=256, expert_ffn=256, q_lora=256, o_lora=128, head_dim=128
)
"""Its rows hold whole blocks of every format."""


@pytest.fixture(scope="module")
def command():
    with commands.command("synth") as command:
        yield command


@pytest.fixture
def synth(command, tmp_path):
    """Return a function that runs `ds4jax synth` in `tmp_path`."""

    def run(**flags) -> tuple[int, str, str]:
        words = [f"--{name}={value}" for name, value in flags.items()]
        return command.run(tmp_path, "--out=t.gguf", *words)

    return run


def draw(type: str, shape=(300, 1024), name="x", seed=0):
    spec = schema.TensorSpec(shape, "dense")
    return synthetic.tensor(CONFIG, name, spec, type, seed)


@pytest.mark.parametrize("type", TYPES)
def test_matrices_have_mean_0_and_rms_of_one_over_the_root_of_their_width(type):
    for width in (256, 4096):
        values = np.asarray(quant.dequantize(draw(type, (2**20 // width, width))))
        values = values.astype(np.float64) * width**0.5
        assert values.shape == (2**20 // width, width)
        assert abs(values.mean()) < 0.02
        assert 0.95 < np.sqrt(np.mean(values**2)) < 1.06


@pytest.mark.parametrize("type", quant.FORMATS)
def test_planes_take_every_value_that_they_may(type):
    tensor = draw(type)
    assert isinstance(tensor, quant.QuantTensor)
    models.assert_same(quant.pack(type, quant.unpack(tensor)), tensor)
    for name, plane in tensor.planes.items():
        values = np.asarray(plane)
        found = len(np.unique(values))
        if name in ("d", "dmin"):
            assert 8 < found <= 16  # neighbours among subnormals coincide
        elif name == "exponents":
            assert found == 2
        elif type == "Q4_K" and name in ("scales", "mins"):
            assert found == 64
        else:
            assert len(np.unique(values.view(np.uint8))) == 256


def test_a_tensor_depends_on_its_name_and_the_seed_alone():
    first, *others = (
        np.asarray(draw("F32", name=name, seed=seed))
        for name, seed in (("x", 0), ("y", 0), ("x", 1))
    )
    for other in others:
        assert np.mean(first == other) < 0.01
    np.testing.assert_array_equal(np.asarray(draw("F32")), first)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(np.asarray(draw("F32")), first)


def test_chunks_of_a_tensor_differ(monkeypatch):
    monkeypatch.setattr(synthetic, "_CHUNK", 100)
    words = np.asarray(synthetic._bits(jax.random.key(0), (1234,), "uint32"))
    assert len(np.unique(words)) == 1234


def test_every_tensor_of_the_schema_is_there_in_the_type_of_its_group():
    for mtp, specs in ((False, schema.trunk(CONFIG)), (True, schema.mtp(CONFIG))):
        found = synthetic.weights(CONFIG, PLANS["ds4-q2"], mtp=mtp)
        assert found.keys() == specs.keys()
        for name, spec in specs.items():
            assert found[name].shape == spec.shape, name
            weight = found[name]
            is_packed = isinstance(weight, quant.QuantTensor)
            kind = weight.format if is_packed else weight.dtype.name
            expected = {
                "dense": "Q8_0", "plain": "float16", "experts": "IQ2_XXS",
                "down": "Q2_K", "vector": "float32", "table": "int32",
            }  # fmt: skip
            assert kind == expected[spec.group], name
            if spec.group != "table":
                assert find_flaw(jax.tree.map(np.asarray, weight)) is None


def test_a_table_gives_a_token_different_experts_and_uses_all():
    spec = schema.TensorSpec((2000, 6), "table")
    ids = np.asarray(synthetic.tensor(CONFIG, "t", spec, "I32"))
    assert ids.dtype == np.int32
    assert all(len(set(row)) == 6 for row in ids)
    assert set(ids[:, 0]) == set(range(CONFIG.experts))


def test_partial_blocks_and_too_many_layers_are_refused():
    with pytest.raises(ConfigError, match=r"x: Q2_K needs .* of 256, found shape \(3,"):
        draw("Q2_K", (3, 128))
    with pytest.raises(ConfigError, match=r"layers: expected 1\.\.43, found 44"):
        synthetic.shorten(ModelConfig.flash(), 44)


def test_shortening_keeps_the_leading_layers():
    short = synthetic.shorten(ModelConfig.flash(), 2)
    assert short.compress_ratios == (0, 0)
    assert (short.layers, short.hash_layers) == (2, 2)
    assert short == ModelConfig.flash(layers=2, compress_ratios=(0, 0), hash_layers=2)
    assert synthetic.shorten(ModelConfig.flash(), 43) == ModelConfig.flash()


@pytest.mark.parametrize("plan", ["ds4-q2", "ds4-q4", "f16"])
def test_a_file_holds_the_bits_that_are_made_on_the_device(synth, tmp_path, plan):
    """Seen red with a writer that makes the tensors with seed 0 whatever is asked."""
    mtp_out = tmp_path / "m.gguf"
    done = synth(shape="tiny", layers=3, plan=plan, seed=5, mtp_out=mtp_out)
    assert done[0] == 0, done
    config, trunk = gguf.load_trunk(tmp_path / "t.gguf")
    assert config == synthetic.shorten(ModelConfig.tiny(), 3)
    types = PLANS[plan]
    models.assert_same(trunk, synthetic.weights(config, types, 5))
    mtp = synthetic.weights(config, PLANS[mtp_plan(plan)], 5, mtp=True)
    models.assert_same(gguf.load_mtp(mtp_out, config), mtp)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "t.gguf"]


def test_weights_on_the_device_need_no_file(command, tmp_path):
    words = "--shape=tiny", "--layers=1", "--plan=f32", "--device"
    status, out, err = command.run(tmp_path, *words, "--head")
    assert status == 0, err
    config = synthetic.shorten(ModelConfig.tiny(), 1)
    for line, mtp in zip(out.splitlines(), (False, True), strict=True):
        specs = schema.mtp(config) if mtp else schema.trunk(config)
        size = 4 * sum(math.prod(spec.shape) for spec in specs.values())
        said = f"{'MTP block' if mtp else 'trunk'}, f32: {len(specs)} tensors, {size:,}"
        assert line.startswith(said + " bytes in ") and " GB/s) on cpu" in line
    assert list(tmp_path.iterdir()) == []
    for more, said in (
        (["--out=t.gguf"], "--out: expected no file with --device"),
        (["--mtp_out=t.gguf"], "--mtp_out: expected no file with --device"),
        (["--nodevice", "--head"], "--head: expected --device with it"),
        (["--nodevice"], "missing --out=STRING"),
    ):
        status, out, err = command.run(tmp_path, *words, *more)
        assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_a_device_that_is_full_is_told_in_one_line():
    program = (
        "from ds4jax import cli, synthetic\n"
        "def full(*_, **__): raise MemoryError('no room')\n"
        "synthetic.weights = full\n"
        "raise SystemExit(cli.main(['synth', '--device']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ds4jax synth: out of memory; expected a smaller")
    assert done.stderr.count("\n") == 1


def test_peak_memory_is_told_where_it_is_known():
    unknown = "peak memory not told by this backend"
    assert synth_device.peak(None) == synth_device.peak({}) == unknown
    assert synth_device.peak({"peak_bytes_in_use": 12345}) == "peak memory 12,345 bytes"


def test_a_synthetic_model_stays_packed():
    model = deepseek.synthetic_model(CONFIG, "ds4-q2", 3, mtp=True)
    models.assert_same(model.trunk, synthetic.weights(CONFIG, PLANS["ds4-q2"], 3))
    head = synthetic.weights(CONFIG, PLANS["mtp-q4"], 3, mtp=True)
    models.assert_same(model.mtp, head)
    packed = [w for w in model.trunk.values() if isinstance(w, quant.QuantTensor)]
    assert len(packed) > 10
    assert not deepseek.synthetic_model(CONFIG, "f16").mtp
    with pytest.raises(ConfigError, match="plan: expected one of"):
        deepseek.synthetic_model(CONFIG, "q3")


def test_activations_keep_their_size_through_all_layers():
    """Of every kind of layer, in a model twelve layers deep."""
    config = models.micro_config(
        hidden=256, expert_ffn=256, q_lora=256, o_lora=128, head_dim=128,
        layers=12, compress_ratios=(0, 4, 16) * 4,
    )  # fmt: skip
    model = deepseek.build(config, synthetic.weights(config, PLANS["ds4-q2"]))
    out = models.trunk(model, models.text(config, 40))
    streams = np.asarray(out.streams)
    assert 0.5 < np.sqrt(np.mean(streams**2)) < 50
    logits = np.asarray(out.logits)
    assert 0.5 < logits.std() < 2


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"layers": 7}, "layers: expected 1..6, found 7"),
        ({"mtp_out": "./t.gguf"}, "expected another file than --out"),
        ({"mtp_out": "no/m.gguf"}, "no/m.gguf: cannot be written"),
        ({"plan": "q3"}, "--plan=q3"),
    ],
)
def test_mistakes_are_told_and_leave_no_file(synth, tmp_path, flags, said):
    status, _, err = synth(shape="tiny", **flags)
    assert status == 2 and said in err
    assert list(tmp_path.iterdir()) == []
