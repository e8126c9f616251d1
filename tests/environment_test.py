"""What a measurement says of where it was made."""

from ds4jax.experiments import environment


def test_a_copy_of_the_sources_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("DS4JAX_COMMIT", "0123456789ab")
    assert environment.describe()["commit"] == "0123456789ab"
    monkeypatch.setenv("DS4JAX_COMMIT", "")
    assert environment.describe()["commit"] != ""
