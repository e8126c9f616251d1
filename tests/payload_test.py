"""A sequence in a file: what comes back goes on with the same bits, or is refused.

Property 29 of SPECULATION §7, and 12-16 as far as they are of restoring.
"""

import dataclasses
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy

from ds4jax import quant
from ds4jax.decode import carry as carries
from ds4jax.decode import driver, payload, transitions
from ds4jax.decode.modes import CONTINUOUS, GREEDY, Decoding, Mode
from ds4jax.errors import CapacityError, ConfigError, FileError

CONFIG, SLIM = models.micro_config(), models.slim_config()
PROMPT = models.text(CONFIG, 39)[0].tolist()
WINDOW = range(40, 58)
SEEDS = 20
END = 70
WARM = dataclasses.replace(CONTINUOUS, temperature=1.0)
PARITY = dataclasses.replace(WARM, policy="parity")
CHAINED = Decoding(mode=Mode("chained", 2), temperature=1.0)
CHAINED_PARITY = dataclasses.replace(CHAINED, policy="parity")


@pytest.fixture(scope="module")
def model():
    return models.quiet(CONFIG, 0.6)


@pytest.fixture(scope="module")
def carry(model):
    """Return a sequence in the middle of a continuous run."""
    return driver.run(model, driver.start(model, PROMPT, 40, WARM), WARM, limit=8)


@pytest.fixture(scope="module")
def saved(model, carry, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "session.safetensors"
    payload.save(path, model, carry)
    return path


def copy(carry):
    return jax.tree.map(jnp.copy, carry)


def blank(carry, config=CONFIG):
    """Return a carry without what nothing can see, which the file leaves out."""
    carry = dataclasses.replace(carry, rng=jax.random.key_data(carry.rng))
    # In numpy: jax would compile each length.
    carry = jax.tree.map(np.asarray, carry)
    length = int(carry.length[0])

    def part(state, ratio):
        rows = state.rows[:, : length // ratio]
        return dataclasses.replace(state, rows=rows)

    def cut(layer, ratio):
        return dataclasses.replace(
            layer,
            compressor=layer.compressor and part(layer.compressor, ratio),
            indexer=layer.indexer and part(layer.indexer, ratio),
        )

    cache = carry.cache
    layers = map(cut, cache.layers, config.compress_ratios)
    return dataclasses.replace(
        carry,
        cache=dataclasses.replace(cache, layers=tuple(layers)),
        tokens=carry.tokens[:, :length],
    )


def assert_same_run(actual, expected, *, config=CONFIG):
    """Compare the ends of two runs, up to what nothing can see."""
    models.assert_same_state(actual.cache, expected.cache, config)
    models.assert_same(
        dataclasses.replace(blank(actual, config), cache=None, mtp_cache=None),
        dataclasses.replace(blank(expected, config), cache=None, mtp_cache=None),
    )
    if expected.mtp_cache:
        models.assert_same(actual.mtp_cache, expected.mtp_cache)


@pytest.mark.parametrize(
    "config, how",
    [
        (SLIM, GREEDY), (CONFIG, WARM), (SLIM, PARITY),
        (SLIM, CHAINED), (SLIM, CHAINED_PARITY),
    ],
    ids=["plain", "continuous", "parity", "chained", "chained-parity"],
)  # fmt: skip
def test_a_restored_run_ends_with_the_bits_of_the_uninterrupted_one(
    tmp_path, config, how
):
    """At every length that a cycle stops at, with all that then waits in the anchor.

    Parity forgets the anchor, so there the run to compare with forgot it at the same
    place.  Seen red with the budget or the head's tags left out, with the anchor kept
    in parity, and with it dropped when warm.  The state of every kind of layer is
    restored the same way in all modes.
    """
    model = models.quiet(config, 0.6)
    waiting, lengths = set(), set()
    for seed in range(SEEDS):
        prompt = PROMPT[seed % 4 :]
        carry = driver.start(model, prompt, END - len(prompt), how, seed)
        while int(carry.length[0]) < WINDOW.stop:
            carry = driver.run(model, carry, how, limit=1)
            length = int(carry.length[0])
            if length not in WINDOW or length in lengths:
                continue
            lengths.add(length)
            if carry.anchor is not None:
                waiting.add(int(carry.anchor.rows[0]))
            check_restored(model, tmp_path / "a", carry, how)
    assert lengths == set(WINDOW)
    assert (
        waiting
        == {"plain": set(), "continuous": {1, 2}, "chained": {1, 2, 3}}[how.mode.kind]
    )


def check_restored(model, path, carry, how):
    payload.save(path, model, carry)
    restored = payload.restore(path, model, decoding=how)
    whole = copy(carry)
    if restored.anchor is not None:
        assert bool(restored.anchor.valid[0]) == (how.policy == "warm")
    if how.policy == "parity":
        whole = transitions.drop_anchor(whole, jnp.ones_like(whole.done))
    # The same shapes and types, so nothing is compiled again.
    assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, whole)
    models.assert_same(blank(restored, model.config), blank(whole, model.config))
    ends = [driver.run(model, each, how) for each in (restored, whole)]
    assert int(ends[0].length[0]) == END
    assert_same_run(*ends, config=model.config)


def test_warm_drafts_at_once_and_parity_goes_through_a_cold_cycle(model, saved):
    """Property 15: the event restore.  Seen red with the anchor kept, and dropped."""
    for how, boots in (WARM, 0), (PARITY, 1):
        carry = payload.restore(saved, model, decoding=how)
        before = carry.statistics.of()["boots"]
        carry = driver.run(model, carry, how, limit=2)
        assert carry.statistics.of()["boots"] - before == boots


@pytest.mark.parametrize("back", [0, 1, 5, 31])
def test_a_restored_sequence_rewinds_as_far_as_the_rings_reach(
    model, carry, saved, back
):
    """Seen red with every third row of a ring lost, and with `reach` left out."""
    restored = payload.restore(saved, model)
    assert driver.rewind_limit(restored) == driver.rewind_limit(carry)
    keep = int(carry.length[0]) - back
    keep = max(keep, driver.rewind_limit(carry))
    ends = [
        driver.run(model, driver.rewind(model, each, keep, WARM), WARM)
        for each in (restored, copy(carry))
    ]
    assert_same_run(*ends)
    with pytest.raises(CapacityError, match="rewind: expected a length in"):
        driver.rewind(model, ends[0], driver.rewind_limit(ends[0]) - 1, WARM)


def test_a_larger_context_has_the_same_state_and_room_for_more(model, carry, saved):
    restored = payload.restore(saved, model, max_context=300)
    assert restored.max_context == 512
    models.assert_same(blank(restored), blank(carry))
    # Another size is another program, whose last bits may differ; not the tokens.
    there, here = (driver.run(model, c, WARM) for c in (restored, copy(carry)))
    assert driver.committed(there) == driver.committed(here)


def test_the_file_holds_what_is_live(model, carry, saved, tmp_path):
    """Its size does not grow with the context; it is the same file every time."""
    larger = payload.restore(saved, model, max_context=1024)
    payload.save(tmp_path / "a", model, larger)
    assert abs(os.path.getsize(tmp_path / "a") - os.path.getsize(saved)) < 64
    payload.save(tmp_path / "a", model, carry)
    assert safetensors.numpy.load_file(tmp_path / "a").keys() == read(saved)[0].keys()
    arrays = read(saved)[0]
    assert arrays["tokens"].shape == (1, int(carry.length[0]))
    assert arrays["cache.layers.2.compressor.rows"].shape[1] == carry.length[0] // 16


def test_a_sequence_without_tokens_comes_back(model, tmp_path):
    carry = driver.create(model, 1, GREEDY, seed=5)
    payload.save(tmp_path / "a", model, carry)
    restored = payload.restore(tmp_path / "a", model, decoding=GREEDY)
    models.assert_same(blank(restored), blank(carry))


def test_several_sequences_are_refused(model, carry, tmp_path):
    both = carries.concatenate([carry, carry])
    with pytest.raises(ConfigError, match="sequences: expected 1 to save, found 2"):
        payload.save(tmp_path / "a", model, both)
    assert not list(tmp_path.iterdir())


def refused(path, model, error, *words, **options) -> str:
    """Check that a file is refused in one line that has `words`."""
    with pytest.raises(error) as told:
        payload.restore(path, model, **options)
    text = str(told.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def test_any_byte_that_changed_is_found(model, saved, tmp_path):
    """Every byte of the header, and many of the arrays.

    Seen red without the checksum.
    """
    whole = saved.read_bytes()
    path = tmp_path / "a"
    head = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(head), *np.linspace(head, len(whole) - 1, 200, dtype=int)]
    changes = [(place, 1 << place % 8) for place in places]
    # A tab is as good JSON as a space.
    changes += [(place, 0x29) for place in range(head) if whole[place] == 0x20]
    for place, change in changes:
        damaged = bytearray(whole)
        damaged[place] ^= change
        path.write_bytes(damaged)
        refused(path, model, FileError, str(path))


def test_a_short_or_a_longer_file_is_found(model, saved, tmp_path):
    whole = saved.read_bytes()
    path = tmp_path / "a"
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, model, FileError, str(path), "expected a saved session")
    path.write_bytes(whole + b"\0")
    refused(path, model, FileError, str(path), "expected a saved session")


def test_what_is_no_session_is_told(model, tmp_path):
    refused(tmp_path / "none", model, FileError, "none: cannot be read: No such file")
    refused(tmp_path, model, FileError, "cannot be read: ")
    (tmp_path / "text").write_text("Call me Ishmael. " * 9)
    refused(tmp_path / "text", model, FileError, "text: expected a saved session")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", model, FileError, "found other data")
    metadata = {"ds4jax.session": "[1]"}
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "list", metadata)
    refused(tmp_path / "list", model, FileError, "version 1, found None")
    metadata = {"ds4jax.session": "{"}
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "open", metadata)
    refused(tmp_path / "open", model, FileError, "expected a saved session")
    metadata = {"ds4jax.session": '{"version": 1}'}
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "bare", metadata)
    refused(tmp_path / "bare", model, FileError, "damaged")


def read(path) -> tuple[dict, dict]:
    """Return the arrays and the header of a file."""
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["ds4jax.session"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def forge(path, arrays, header):
    """Write a file whose checksum is right, by the format as it is described."""
    metadata = {"ds4jax.session": json.dumps(header), "sha256": "0" * 64}
    data = safetensors.numpy.save(arrays, metadata)
    before, after = data.split(b"0" * 64)
    digest = hashlib.sha256(before + after).hexdigest()
    path.write_bytes(before + digest.encode() + after)


def test_a_forged_file_is_read_and_its_arrays_are_checked(
    model, carry, saved, tmp_path
):
    path = tmp_path / "a"
    arrays, header = read(saved)
    forge(path, arrays, header)
    models.assert_same(blank(payload.restore(path, model)), blank(carry))

    def changed(**changes):
        forge(path, {k: v for k, v in (arrays | changes).items() if v is not None},
              header)  # fmt: skip

    changed(logits=None)
    refused(path, model, FileError, "logits: expected float32 (1, 96), found nothing")
    changed(more=np.zeros(3))
    refused(path, model, FileError, "more: not expected")
    changed(logits=arrays["logits"][:, :95].copy())
    refused(path, model, FileError, "logits: expected float32 (1, 96), found", "95")
    changed(tokens=arrays["tokens"].astype(np.int64))
    refused(path, model, FileError, "tokens: expected int32", "found int64")
    changed(tokens=arrays["tokens"][:, 1:].copy())
    refused(path, model, FileError, "tokens: expected int32")
    forge(path, arrays, header | {"version": 2})
    refused(path, model, FileError, "expected a session of version 1, found 2")


def test_another_model_is_refused(model, saved):
    """One value of one tensor in each part; its architecture; its packing."""
    for part, name in ("trunk", "output.weight"), ("mtp", "mtp.0.e_proj.weight"):
        weights = getattr(model, part)
        other = weights | {name: weights[name].at[0, 0].add(1e-6)}
        other = dataclasses.replace(model, **{part: other})
        refused(saved, other, FileError, f"of another model: its {part} weights")
    config = dataclasses.replace(CONFIG, swiglu_limit=2.0)
    other = dataclasses.replace(model, config=config)
    refused(saved, other, ConfigError, "swiglu_limit:", "has 1.5, the model has 2.0")


def test_heads_must_suit(model, saved, tmp_path):
    headless = dataclasses.replace(model, mtp={})
    refused(saved, headless, ConfigError, "the model has no head", decoding=GREEDY)
    plain = driver.start(headless, PROMPT, 5, GREEDY)
    path = tmp_path / "plain"
    payload.save(path, headless, plain)
    refused(path, model, ConfigError, "depth: expected 0 for", "found 1")
    # A head makes no difference to what never had its state.
    restored = payload.restore(path, model, decoding=GREEDY)
    models.assert_same(blank(restored), blank(plain))


def test_too_small_a_context_is_refused(model, tmp_path):
    carry = driver.create(model, 512)
    length = jnp.full_like(carry.length, 300)
    carry = dataclasses.replace(
        carry, cache=dataclasses.replace(carry.cache, length=length)
    )
    payload.save(tmp_path / "a", model, carry)
    refused(
        tmp_path / "a", model, CapacityError, "max_context: expected at least 300",
        "found 200", max_context=200,
    )  # fmt: skip
    refused(tmp_path / "a", model, CapacityError, "at least 1", max_context=0)
    assert payload.restore(tmp_path / "a", model, max_context=301).max_context == 512


def test_a_file_is_replaced_whole_or_not_at_all(model, carry, tmp_path, monkeypatch):
    """Seen red without the flush."""
    path = tmp_path / "a"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(FileError, match="a: cannot be written: No space left"):
            payload.save(path, model, carry)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    payload.save(path, model, carry)
    assert list(tmp_path.iterdir()) == [path]
    assert payload.restore(path, model).max_context == 256


def test_a_fingerprint_tells_names_shapes_types_and_values():
    """Seen red with names, kinds or shapes left out of the digest."""
    base = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3)}
    raw = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    packed = {"a": jax.tree.map(jnp.asarray, quant.pack("Q8_0", raw))}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        base | {"a": base["a"].reshape(4, 3)},
        base | {"a": base["a"].at[2, 3].set(0)},
        base | {"b": jax.lax.bitcast_convert_type(base["b"], jnp.int32)},
        {"a": base["a"]},
        packed,
        {"a": quant.dequantize(packed["a"])},
    ]
    assert len({payload.fingerprint(v) for v in variants}) == len(variants)
    again = dict(reversed(list(base.items())))
    assert payload.fingerprint(again) == payload.fingerprint(base)


def test_a_fingerprint_looks_at_every_column_and_costs_little():
    """Seen red with an even stride, which stays in one column of such a matrix."""
    shape = 2048, 256
    traced = jax.eval_shape(payload._sample, {"a": jax.ShapeDtypeStruct(shape, "int8")})
    assert traced["a"].size < 1000
    columns = np.broadcast_to(np.arange(256, dtype=np.uint8), shape)
    assert len(set(np.asarray(payload._sample({"a": columns})["a"]).tolist())) > 200
