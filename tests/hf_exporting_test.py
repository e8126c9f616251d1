"""A model under transformers' keys and names is the model that was read from them."""

import dataclasses
import json

import golden
import numpy as np
import pytest

from ds4jax import assets, gguf, hf
from ds4jax.config import ModelConfig
from ds4jax.errors import ConfigError
from ds4jax.hf import exporting


def stored() -> dict[str, np.ndarray]:
    """Return the golden weights under transformers' own names, the trunk's only."""
    with np.load(golden.PATH) as arrays:
        names = [n for n in arrays if n.startswith("weights/") and "/mtp." not in n]
        return {name.removeprefix("weights/"): arrays[name] for name in names}


@pytest.mark.parametrize("config", [ModelConfig.flash(), golden.load()[0]])
def test_an_architecture_comes_back(config):
    assert hf.config(json.loads(json.dumps(exporting.settings(config)))) == config


def test_the_shipped_architecture_comes_back():
    config, _ = gguf.load_trunk(assets.trunk())
    assert hf.config(exporting.settings(config)) == config


def test_weights_come_back():
    expected = stored()
    _, trunk, _, _ = golden.load()
    found = exporting.state(expected, trunk)
    assert set(found) == set(expected)
    assert any("gate_up_proj" in name for name in found)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_what_transformers_does_not_compute_is_refused():
    config = ModelConfig.flash()
    with pytest.raises(ConfigError, match="kv_rounding: expected 'none'"):
        exporting.settings(dataclasses.replace(config, kv_rounding="ds4"))
    ratios = (0, 0, 4, 128, 16, *config.compress_ratios[5:])
    with pytest.raises(ConfigError, match="compress_ratios: expected 0, 4 and one"):
        exporting.settings(dataclasses.replace(config, compress_ratios=ratios))


@pytest.mark.parametrize("name", ["model.nothing", "layers.2.ffn.experts.0.w1.weight"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="expected a tensor of transformers'"):
        exporting.state([name], {})
