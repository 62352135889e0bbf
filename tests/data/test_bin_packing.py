"""Bin packing: every piece is in exactly one pack, no pack is too full, and none is unneeded."""

from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.bin_packing import PACKERS, Packs, balanced, best_fit, greedy

CAPACITY = 12
lengths_lists = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60).map(np.array)


def packed_lengths(packs: Packs, lengths: np.ndarray) -> list[list[int]]:
    return [lengths[packs[n]].tolist() for n in range(len(packs))]


def test_greedy_opens_a_pack_when_the_next_piece_does_not_fit():
    lengths = np.array([5, 5, 3, 12, 1, 11])
    assert packed_lengths(greedy(lengths, 12), lengths) == [[5, 5], [3], [12], [1, 11]]


def test_best_fit_puts_the_longest_piece_first_into_the_fullest_pack_with_room():
    lengths = np.array([3, 9, 7, 2, 5, 1])  # 9 | 7 and 5 | 3 beside 9 | 2 and 1 left
    assert packed_lengths(best_fit(lengths, 12), lengths) == [[3, 9], [7, 5], [2, 1]]


def test_balanced_gives_the_longest_piece_first_to_the_pack_with_the_least_work_and_room():
    lengths = np.array([3, 9, 7, 2, 5, 1])  # 9 | 7 | 5, which has the least work to the end
    assert packed_lengths(balanced(lengths, 12), lengths) == [[9], [7], [3, 2, 5, 1]]


def test_balanced_opens_a_pack_for_a_piece_without_room():
    lengths = np.array([6, 6, 5, 4, 3])  # of 24 tokens, which two packs could hold
    assert packed_lengths(balanced(lengths, 12), lengths) == [[6, 5], [6, 4], [3]]


def test_best_fit_packs_one_window_after_another():
    lengths = np.array([7, 7, 5, 5])
    assert packed_lengths(best_fit(lengths, 12), lengths) == [[7, 5], [7, 5]]
    assert packed_lengths(best_fit(lengths, 12, window=2), lengths) == [[7], [7], [5, 5]]


@pytest.mark.parametrize("name", PACKERS)
@given(lengths=lengths_lists)
def test_every_piece_is_in_one_pack_and_no_pack_is_too_full(name, lengths):
    packs = PACKERS[name](lengths, CAPACITY)
    assert sorted(packs.pieces.tolist()) == list(range(len(lengths)))
    assert packs.bounds[0] == 0
    assert packs.bounds[-1] == len(lengths)
    assert all(0 < sum(pack) <= CAPACITY for pack in packed_lengths(packs, lengths))


@given(lengths=lengths_lists)
def test_greedy_keeps_the_order_and_closes_a_pack_only_without_room_for_the_next(lengths):
    packs = packed_lengths(greedy(lengths, CAPACITY), lengths)
    assert list(chain.from_iterable(packs)) == lengths.tolist()
    assert all(sum(pack) + following[0] > CAPACITY for pack, following in pairwise(packs))


@given(lengths=lengths_lists)
def test_best_fit_opens_a_pack_only_for_a_piece_that_fits_into_none(lengths):
    packs = packed_lengths(best_fit(lengths, CAPACITY), lengths)
    for earlier_pack, pack in combinations(packs, 2):
        assert CAPACITY - sum(earlier_pack) < max(pack)


@given(lengths=lengths_lists)
def test_balanced_equals_a_search_through_all_packs(lengths):
    packs: list[list[int]] = [[] for _ in range(-(-int(lengths.sum()) // CAPACITY))]
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        with_room = [pack for pack in packs if lengths[[*pack, piece]].sum() <= CAPACITY]
        if not with_room:
            packs.append([])
            with_room = packs[-1:]
        min(with_room, key=lambda pack: work(lengths[pack])).append(piece)
    found = balanced(lengths, CAPACITY)
    assert [found[n].tolist() for n in range(len(found))] == [sorted(pack) for pack in packs]


def test_balanced_packs_have_even_work_without_more_packs_than_best_fit():
    """Documents of 3 to 3,000 tokens, the longest of which have most of the work."""
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 5000).astype(int).clip(3, 3000)
    packs = {name: PACKERS[name](lengths, 16384) for name in ("best-fit", "balanced")}
    work_of = {
        name: np.array([work(lengths[found[n]]) for n in range(len(found))])
        for name, found in packs.items()
    }
    assert len(packs["balanced"]) <= len(packs["best-fit"])
    assert work_of["balanced"].max() < 1.1 * work_of["balanced"].mean()
    assert work_of["best-fit"].max() > 2 * work_of["best-fit"].mean()


def work(lengths: np.ndarray) -> int:
    return int((lengths * (lengths + 1) // 2).sum())
