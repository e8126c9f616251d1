"""How a GPU's time line is split among launches that run beside each other."""

import importlib

from pytest import approx

device_time = importlib.import_module("device_time")
shares = device_time.shares


def launch(start: float, us: float):
    """Return one that starts at so many microseconds."""
    return device_time.Launch("kernel", 1e3 * start, us)


def test_launches_one_after_the_other_take_their_own_time():
    assert shares([launch(0, 2), launch(2, 3), launch(9, 1)]) == approx([2, 3, 1])


def test_launches_beside_each_other_split_the_time():
    """Of 10 us three run during two, and two during five.

    Seen red with each moment given to whoever runs by how long it takes.
    """
    found = [launch(0, 10), launch(1, 7), launch(4, 2)]
    third = 2 / 3
    expected = [3 + 5 / 2 + third, 5 / 2 + third, third]
    assert shares(found) == approx(expected)
    assert sum(shares(found)) == approx(10)
    assert shares(found[::-1]) == approx(expected[::-1])


def test_launches_without_a_duration_take_nothing():
    """Seen red with ends before starts at the same time."""
    found = [launch(0, 4), launch(1, 0), launch(4, 0), launch(4, 1)]
    assert shares(found) == approx([4, 0, 0, 1])
    assert shares([]) == []
