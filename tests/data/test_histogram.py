"""The histogram of lengths: exact at powers of two, and complete."""

import numpy as np

from megatron_ring.data.histogram import drawn, length_histogram


def test_a_power_of_two_begins_a_bin():
    assert length_histogram(np.array([4, 7, 8, 8, 31])) == [(4, 2), (8, 2), (16, 1)]
    assert length_histogram(np.array([0, 1, 2])) == [(1, 2), (2, 1)]
    assert length_histogram(np.array([2**30 - 1, 2**30])) == [(2**29, 1), (2**30, 1)]


def test_it_is_drawn_with_bars():
    assert drawn(np.array([1, 1, 4])).splitlines() == [
        "tokens, from   documents",
        "           1             2  " + "#" * 40,
        "           2             0",
        "           4             1  " + "#" * 20,
    ]
