"""`tiny.npz` is what transformers computes today (`make golden`)."""

import numpy as np
import pytest

import golden

pytest.importorskip("torch", reason="make golden installs it")
pytest.importorskip("transformers", reason="make golden installs it")


def test_stored_vectors_are_those_of_transformers():
    from golden import make_golden

    made = make_golden.make()
    with np.load(golden.PATH) as stored:
        assert set(stored) == set(made)
        for name in stored:
            if name == "config":  # holds the version of transformers
                continue
            elif stored[name].dtype == np.float32:
                np.testing.assert_allclose(
                    made[name], stored[name], rtol=0, atol=1e-4, err_msg=name
                )
            else:
                np.testing.assert_array_equal(made[name], stored[name], err_msg=name)
