"""Owners of positions, and the buffers of one layer, without ranks."""

import pytest
import torch

from megatron_ring.errors import ConfigError
from megatron_ring.inference import cache as cache_module
from megatron_ring.inference.cache import Cache, CacheShape, KeyValues, Ownership, chunk_owners

HEADS, HEAD_DIM = 2, 4


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 1, 5, 8])
@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
def test_position_p_belongs_to_rank_p_mod_r_under_stripes_of_one(ring_size, start, tokens):
    owners = chunk_owners("striped", 1, ring_size, start, tokens)
    assert owners.tolist() == [p % ring_size for p in range(start, start + tokens)]


@pytest.mark.parametrize(
    ("layout", "stripe", "expected"),
    [
        ("ring", 1, [0, 0, 0, 0, 1, 1, 1]),
        ("zigzag", 1, [0, 0, 1, 1, 1, 1, 0]),
        ("striped", 2, [0, 0, 1, 1, 1, 1, 0]),
    ],
)
def test_a_prompt_is_owned_as_in_training(layout, stripe, expected):
    assert chunk_owners(layout, stripe, 2, 0, 7).tolist() == expected


def test_a_layout_for_one_rank_is_refused_on_two():
    with pytest.raises(ConfigError, match="--context-parallel"):
        chunk_owners("none", 1, 2, 0, 7)


def test_positions_and_counts_of_a_rank_begin_at_start():
    ownership = Ownership([8, 2])
    ownership.append(0, torch.tensor([0, 1, 1], dtype=torch.int16))
    ownership.append(0, torch.tensor([1, 0], dtype=torch.int16))
    assert ownership.lengths == [5, 0]
    assert ownership.positions(0, 1).tolist() == [1, 2, 3]
    assert ownership.positions(0, 1, start=2).tolist() == [2, 3]
    assert ownership.positions(0, 0, start=-3).tolist() == [0, 4]
    assert ownership.count(0, 1, start=3) == 1
    assert ownership.count(1, 0) == 0


def entries(first: int, count: int) -> torch.Tensor:
    """Return keys, or values, that are their entry's number everywhere: (count, G, D)."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return numbers[:, None, None].expand(count, HEADS, HEAD_DIM)


def numbers(kv_2GMD: torch.Tensor) -> list[int]:
    """Return the numbers of entries whose keys are these and whose values are 100 more."""
    k_M, v_M = kv_2GMD[:, 0, :, 0]
    assert torch.equal(v_M, k_M + 100)
    assert torch.equal(kv_2GMD, kv_2GMD[:, :1, :, :1].expand_as(kv_2GMD))
    return k_M.int().tolist()


def test_a_window_keeps_the_last_entries_in_a_buffer_that_does_not_grow():
    kv = KeyValues(torch.empty(2, HEADS, 5, HEAD_DIM), window=3)
    allocated = kv.nbytes
    for number in range(40):
        still_seen = min(number, 3)
        kv.append(entries(number, 1), entries(number + 100, 1), still_seen)
        assert numbers(kv.last(still_seen + 1)) == list(range(number - still_seen, number + 1))
    assert kv.nbytes == allocated


def test_a_chunk_longer_than_the_window_is_seen_whole_and_its_end_is_kept():
    kv = KeyValues(torch.empty(2, HEADS, 3, HEAD_DIM), window=3)
    allocated = kv.nbytes
    seen = kv.extend(entries(0, 7), entries(100, 7), seen=0, still_seen=2)
    assert numbers(seen) == list(range(7))
    seen = kv.extend(entries(7, 2), entries(107, 2), seen=2, still_seen=3)
    assert numbers(seen) == [5, 6, 7, 8]
    assert numbers(kv.last(3)) == [6, 7, 8]
    assert kv.nbytes == allocated


@pytest.mark.parametrize("window", [0, 4])
def test_a_buffer_that_is_too_small_is_replaced_without_losing_entries(window):
    """A rank may own more of a prompt than its share, except under stripes of one."""
    kv = KeyValues(torch.empty(2, HEADS, 2, HEAD_DIM), window)
    assert numbers(kv.extend(entries(0, 4), entries(100, 4), 0, 4)) == [0, 1, 2, 3]
    kv.append(entries(4, 1), entries(104, 1), 4)
    assert numbers(kv.last(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ring_size", [1, 2, 4])
def test_the_size_of_a_cache_is_known_before_it_is_allocated(ring_size):
    shape = CacheShape({0: 0, 1: 6}, HEADS, HEAD_DIM, ring_size, 0, "striped")
    capacity = [1000, 10]
    cache = Cache(shape, capacity, torch.float32, "cpu")
    window = -(-6 // ring_size) + cache_module._FREE_ENTRIES
    of_entries = -(-1000 // ring_size) + window + 2 * -(-10 // ring_size)
    assert cache.nbytes == 2 * of_entries * HEADS * HEAD_DIM * 4
    assert shape.nbytes(capacity, torch.float32) == cache.nbytes
