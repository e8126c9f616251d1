"""ds4's rounding, bit for bit: ds4's own results, and a restatement by tables of codes.

`ds4_rounding.npz` is what the C functions of ds4 (antirez/ds4, MIT) give on rows that
are zero, below the smallest scale, of usual size and near the largest F16.  Zeros
compare equal whatever their sign, which a claim of its own covers.
"""

import functools
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ds4jax.model import rounding

VECTORS = dict(np.load(Path(golden.PATH).with_name("ds4_rounding.npz")))
ROPE = 64
"""Of ds4's rows of 512: the last 64 channels are not FP8."""

E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)
"""Code 0, 1, ... 126; 127 is NaN."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

fp8 = jax.jit(rounding.fp8_round_trip)
fp4 = jax.jit(rounding.fp4_round_trip)
hadamard = jax.jit(rounding.hadamard)
round_index = jax.jit(rounding.round_index)
round_kv = jax.jit(lambda row: rounding.round_kv(row, ROPE))


def nearest(size: float, codes: np.ndarray) -> float:
    """Search every code; of two that are as near, take the even one."""
    distance = np.abs(size - codes)
    best = np.flatnonzero(distance == distance.min())
    return codes[best[best % 2 == 0] if len(best) == 2 else best].item()


def power_of_two_at_least(x: np.float32) -> float:
    """Return `2 ** ceil(log2(x))`, by trying them all."""
    return next(2.0**e for e in range(-149, 129) if 2.0**e >= x)


def restated(row: np.ndarray, size: int, codes: np.ndarray, floor: float):
    """Round the blocks of one row of float32 to `codes` and back."""
    out = []
    for block in row.reshape(-1, size):
        peak = max(np.abs(block).max(), np.float32(floor))
        scale = power_of_two_at_least(peak / np.float32(codes[-1]))
        for x in block:
            code = nearest(min(abs(float(x)) / scale, codes[-1]), codes)
            out.append((-code if x < 0 else code) * scale)
    with np.errstate(over="ignore"):  # the largest float32 rounds up to infinity
        return np.array(out).astype(np.float32)


def fp8_restated(row):
    return restated(row, 64, E4M3, 1e-4)


def fp4_restated(row):
    return restated(row, 32, E2M1, 6 * 2.0**-126)


def sylvester(x: np.ndarray) -> np.ndarray:
    """Return the unscaled transform by halves: neighbours are added first."""
    if len(x) == 1:
        return x
    a, b = (sylvester(half) for half in np.split(x, 2))
    return np.concatenate([a + b, a - b])


def index_restated(row):
    return fp4_restated(sylvester(row) * np.float32(len(row) ** -0.5))


FUNCTIONS = {
    "fp8": (fp8, fp8_restated, 64, E4M3),
    "fp4": (fp4, fp4_restated, 32, E2M1),
}
BOTH = pytest.mark.parametrize("name", FUNCTIONS)


def test_tables_are_those_of_the_formats():
    """So ml_dtypes, which has both formats, agrees with the tables above."""
    import ml_dtypes

    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(e4m3.astype(np.float64), E4M3)
    e2m1 = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(e2m1.astype(np.float64), E2M1)


@pytest.mark.parametrize("way", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_ds4s_own_vectors(way):
    same = functools.partial(np.testing.assert_array_equal, strict=True)
    rows, index = jnp.asarray(VECTORS["kv_in"]), jnp.asarray(VECTORS["idx_in"])
    body = way(rounding.fp8_round_trip)(rows[:, :-ROPE])
    same(np.asarray(body), VECTORS["kv_fp8"][:, :-ROPE])
    kept = way(lambda row: rounding.round_kv(row, ROPE))(rows)
    same(np.asarray(kept), VECTORS["kv_fp8_f16"])
    rounded = way(rounding.round_index)(index)
    same(np.asarray(rounded), VECTORS["idx_hadamard_fp4"])


def test_the_restatement_gives_ds4s_vectors_too():
    for row, expected in zip(VECTORS["kv_in"], VECTORS["kv_fp8"], strict=True):
        np.testing.assert_array_equal(fp8_restated(row[:-ROPE]), expected[:-ROPE])
    for row, expected in zip(
        VECTORS["idx_in"], VECTORS["idx_hadamard_fp4"], strict=True
    ):
        np.testing.assert_array_equal(index_restated(row), expected)


def floats(limit: float | None = None):
    """Float32 of any size, subnormal too, and with the same few exponents often."""
    bound = limit and float(np.float32(limit))
    common = st.integers(-(2**12), 2**12).map(lambda n: n * 2.0**-6)
    return common | st.floats(
        bound and -bound, bound, width=32, allow_nan=False, allow_infinity=False
    )


def ties(codes: np.ndarray):
    """Values half way between two codes, for blocks whose scale is 1."""
    middle = ((codes[1:] + codes[:-1]) / 2).tolist()
    return st.sampled_from([*middle, *(-m for m in middle), 0.0, *codes.tolist()])


def without_subnormals(row: np.ndarray) -> np.ndarray:
    """Put zeros for subnormals: for XLA on the CPU they are, and for ds4 they are not.

    FP4 could give some back; to FP8, whose scale is never small, they all vanish.
    """
    return np.where(np.abs(row) < 2.0**-126, 0 * row, row)


@BOTH
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_blocks_are_the_restatement(name, data):
    function, restate, _, codes = FUNCTIONS[name]
    scale = 2.0 ** data.draw(st.integers(-30, 30))
    near = ties(codes).map(lambda tie: tie * scale)
    row = data.draw(arrays(np.float32, 128, elements=floats() | near))
    if name == "fp4":
        row = without_subnormals(row)
    np.testing.assert_array_equal(function(row), restate(row))


@BOTH
def test_values_around_every_tie_and_code(name):
    """Both neighbours of each, at three scales: no step rounds twice."""
    function, restate, size, codes = FUNCTIONS[name]
    middle = (codes[1:] + codes[:-1]) / 2
    values = np.concatenate([codes, middle]).astype(np.float32)
    around = [np.nextafter(values, np.float32(to)) for to in (-1, 500)]
    # A float16 on the way would turn what is just off a tie into the tie.
    off = [(values * (1 + s)).astype(np.float32) for s in (-(2.0**-12), 2.0**-12)]
    values = np.minimum(np.concatenate([values, *around, *off]), codes[-1])
    rows = np.zeros((-(-len(values) // (size - 1)), size), np.float32)
    rows[:, 0] = codes[-1]  # sets the scale to 1
    rows[:, 1:] = np.resize(values, (len(rows), size - 1))
    for scale in (1, 2.0**-9, -(2.0**20)):
        found = np.asarray(function(rows.reshape(-1) * np.float32(scale)))
        np.testing.assert_array_equal(found, restate(rows.reshape(-1) * scale))


@BOTH
def test_the_scale_of_every_binade(name):
    """A peak of the largest code times 2^k fits; the float above it does not.

    Far from 1 that is exacter than ds4, whose `log2f` rounds to k for a float or more
    above 2^k.
    """
    function, _, size, codes = FUNCTIONS[name]
    low = -22 if name == "fp8" else -126
    exponents = np.arange(low + 1, 119)
    peaks = (codes[-1] * 2.0**exponents).astype(np.float32)
    above = np.nextafter(peaks, np.float32(np.inf))
    blocks = np.zeros((2 * len(peaks), size), np.float32)
    blocks[:, 0] = np.concatenate([peaks, above])
    # At the scale 2^k a code; at 2^(k + 1) half of one, a tie that goes to zero.
    smallest = codes[1] * 2.0**exponents
    blocks[:, 1] = np.concatenate([smallest, smallest])
    found = np.asarray(function(blocks.reshape(-1))).reshape(blocks.shape)[:, 1]
    np.testing.assert_array_equal(found, np.concatenate([smallest, 0 * smallest]))


@BOTH
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_second_round_trip_changes_nothing(name, data):
    row = data.draw(arrays(np.float32, 128, elements=floats(1e38)))
    once = FUNCTIONS[name][0](row)
    np.testing.assert_array_equal(FUNCTIONS[name][0](once), once)


@given(arrays(np.float32, 64 + ROPE, elements=floats(3e4)))
@settings(max_examples=30, deadline=None)
def test_a_cached_row_is_one_that_rounding_keeps(row):
    once = np.asarray(round_kv(row))
    np.testing.assert_array_equal(round_kv(once), once)
    np.testing.assert_array_equal(once.astype(np.float16).astype(np.float32), once)
    np.testing.assert_array_equal(once[-ROPE:], row[-ROPE:].astype(np.float16))
    expected = fp8_restated(row[:-ROPE]).astype(np.float16)
    np.testing.assert_array_equal(once[:-ROPE], expected)


def test_zero_rows_stay_zero():
    zeros = np.zeros((3, 128), np.float32)
    for function in (fp8, fp4, hadamard, round_index):
        found = np.asarray(function(zeros))
        np.testing.assert_array_equal(found.view(np.uint32), 0)


@BOTH
def test_what_vanishes_keeps_its_sign(name):
    """As in ds4, where the sign is a factor."""
    function, restate, size, codes = FUNCTIONS[name]
    row = np.full(size, 0.2 * codes[1], np.float32)
    row[1::2] *= -1
    row[0] = codes[-1]
    found, expected = np.asarray(function(row)), restate(row)
    assert not found[1:].any()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@BOTH
def test_a_block_is_rounded_by_itself(name):
    function, _, size, _ = FUNCTIONS[name]
    rows = np.random.default_rng(0).standard_normal((6, 4 * size)).astype(np.float32)
    alone = [np.asarray(function(block)) for block in rows.reshape(-1, size)]
    np.testing.assert_array_equal(np.asarray(function(rows)).reshape(-1, size), alone)
    changed = rows.copy()
    changed[:, size : 2 * size] = np.nan
    others = np.delete(np.arange(4 * size), np.arange(size, 2 * size))
    found = np.asarray(function(changed))[:, others]
    np.testing.assert_array_equal(found, np.asarray(function(rows))[:, others])


def sylvester_matrix(width: int) -> np.ndarray:
    """Return H, from [[1]] by [[H, H], [H, -H]]."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("width", [1, 2, 32, 128])
def test_hadamard_of_integers_is_the_matrix(width):
    """Every sum is exact, so only the last product rounds, whatever the order."""
    rng = np.random.default_rng(width)
    rows = rng.integers(-(2**16), 2**16, (5, width)).astype(np.float32)
    matrix = sylvester_matrix(width)
    sums = (rows.astype(np.float64) @ matrix).astype(np.float32)
    np.testing.assert_array_equal(hadamard(rows), sums * np.float32(width**-0.5))
    np.testing.assert_array_equal(matrix @ matrix, width * np.eye(width))


SIGNS = np.array([-1, 1], np.float32)
# Sums of these stay clear of overflow and, unless they are 0, of subnormals.
usual = st.floats(2.0**-60, 2.0**60, width=32) | st.just(0.0)


@given(arrays(np.float32, 128, elements=usual), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
@example(row=np.full(128, 0.1, np.float32), seed=0)
def test_hadamard_and_index_rows_have_ds4s_order_of_sums(row, seed):
    row = row * np.random.default_rng(seed).choice(SIGNS, len(row))
    expected = sylvester(row) * np.float32(128**-0.5)
    np.testing.assert_array_equal(hadamard(row), expected)
    np.testing.assert_array_equal(round_index(row), index_restated(row))
