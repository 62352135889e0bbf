"""Placements: every token once, what each rank's work is, and how even and small it becomes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.document_histogram import read_histogram
from megatron_ring.context_parallel import placement as placement_module
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, compute_key_ranges
from megatron_ring.context_parallel.placement import (
    CANDIDATES,
    Placement,
    WholeLimits,
    assign,
    estimated_time,
    place_documents,
)
from megatron_ring.context_parallel.placement_cost import measured_costs
from megatron_ring.context_parallel.sample_blocks import (
    BLOCK,
    HopCosts,
    SampleBlocks,
    critical_path,
)
from megatron_ring.kernels.attention.tile_lists import tile_list
from megatron_ring.parallel.peers import peers_in_hop
from megatron_ring.plan.placement_simulation import simulate


@st.composite
def samples(draw) -> tuple[tuple[int, ...], int, int, int]:
    """Return document starts, length, ring size and window."""
    ring_size = draw(st.integers(1, 8))
    shard = draw(st.integers(1, 5)) * BLOCK + draw(st.sampled_from([0, 0, -BLOCK + 1, -1, 1, 40]))
    length = ring_size * shard
    border = st.integers(1, max(1, length - 1))
    starts = {0, *draw(st.lists(border, max_size=12))} - {length}
    window = draw(st.sampled_from([0, 0, 1, 100, BLOCK, 300, length]))
    return tuple(sorted(starts)), length, ring_size, window


def placements(sample) -> list[Placement]:
    starts, length, ring_size, window = sample
    blocks = SampleBlocks.of(np.array(starts), length, ring_size, window)
    costs = HopCosts(), HopCosts(query_tile=5)
    all_owners = [assign(blocks, limits, cost) for limits in CANDIDATES for cost in costs]
    return [Placement(blocks, owners) for owners in [*all_owners, blocks.stripes()]]


@settings(max_examples=25, deadline=None)
@given(samples())
def test_every_token_has_one_owner_and_every_rank_the_same_number_in_increasing_order(sample):
    _, length, ring_size, _ = sample
    for placement, again in zip(placements(sample), placements(sample)):
        positions = [placement.positions(rank) for rank in range(ring_size)]
        assert all(len(p) == length // ring_size for p in positions)
        assert all((p.diff() > 0).all() for p in positions)
        assert torch.equal(torch.cat(positions).sort().values, torch.arange(length))
        assert (placement.owners == again.owners).all()


@settings(max_examples=12, deadline=None)
@given(samples())
def test_the_work_of_a_hop_is_what_the_kernels_lists_of_tiles_say(sample):
    starts, _, ring_size, window = sample
    mask = Mask(window, starts)
    for placement in placements(sample)[::3]:
        tiles_RR, query_tiles_RR = placement.blocks.hop_work(placement.owners)
        positions = [placement.positions(rank) for rank in range(ring_size)]
        for rank in range(ring_size):
            for hop in range(ring_size):
                keys = positions[peers_in_hop(rank, ring_size, hop).sender]
                first = mask.first_visible(positions[rank])
                ranges = compute_key_ranges(positions[rank], keys, first)
                listed = tile_list(ranges.lo, ranges.hi, BLOCK, BLOCK)
                assert tiles_RR[hop, rank] == (-(-listed.columns // BLOCK)).sum()
                assert query_tiles_RR[hop, rank] == len(listed.start)
        assert tiles_RR.sum() == placement.blocks.tiles.sum()


@settings(max_examples=12, deadline=None)
@given(samples())
def test_rows_are_sent_to_the_ranks_that_read_them(sample):
    starts, length, ring_size, window = sample
    position = torch.arange(length)
    first = Mask(window, starts).first_visible(position)
    sees = (first[:, None] <= position) & (position <= position[:, None])
    for placement in placements(sample)[::4]:
        owner = torch.empty(length, dtype=torch.int64)
        for rank in range(ring_size):
            owner[placement.positions(rank)] = rank
        by_owner = np.zeros((ring_size, ring_size))
        forwarded = np.zeros((ring_size, ring_size))
        reads = torch.stack([sees[owner == rank].any(0) for rank in range(ring_size)])
        for hop in range(1, ring_size):
            # Rows of this owner read by the rank that many places after it, and by any still later.
            later = [reads[(owner + more) % ring_size, position] for more in range(hop, ring_size)]
            by_owner[hop] = np.bincount(owner[later[0]], minlength=ring_size)
            travels = torch.stack(later).any(0)
            at = (owner[travels] + hop - 1) % ring_size
            forwarded[hop] = np.bincount(at, minlength=ring_size)
        direct = placement.blocks.rows_sent_directly(placement.owners)
        for hop in range(ring_size):
            for rank in range(ring_size):
                ranks_on = peers_in_hop(rank, ring_size, hop).receiver - rank
                assert direct[hop, rank] == by_owner[ranks_on % ring_size, rank]
        assert (placement.blocks.rows_forwarded(placement.owners) == forwarded).all()


@pytest.mark.parametrize(
    ("owners", "layout"),
    [
        ("stripes", Layout("striped", 4096, 4, stripe_size=BLOCK)),
        ("zigzag", Layout("zigzag", 4096, 4)),
        ("contiguous", Layout("ring", 4096, 4)),
    ],
)
def test_owners_of_the_layouts_are_those_of_their_positions(owners, layout):
    blocks = SampleBlocks.of(np.array([0, 700]), 4096, 4)
    placement = Placement(blocks, getattr(blocks, owners)())
    for rank in range(4):
        assert torch.equal(placement.positions(rank), layout.positions(rank))


def test_a_short_document_stays_on_one_rank_and_a_long_one_is_on_all():
    ring_size, long = 4, 64 * BLOCK
    starts = [0, *range(long, 128 * BLOCK, 4 * BLOCK)]
    placement = place_documents(starts, 128 * BLOCK, ring_size, costs=HopCosts(query_tile=5))
    owners = placement.owners
    assert (np.bincount(owners[:64], minlength=ring_size) == 16).all()
    assert all(len(set(owners[first : first + 4])) == 1 for first in range(64, 128, 4))


def test_a_document_goes_to_the_smallest_group_that_can_hold_it():
    # Of eight ranks: documents of two shards, of three, and many short ones.
    shard = 32
    starts = [0, 2 * shard, 5 * shard, *range(5 * shard, 8 * shard, 4)[1:]]
    blocks = SampleBlocks.of(np.array(starts) * BLOCK, 8 * shard * BLOCK, 8)
    owners = assign(blocks, WholeLimits(tokens=1, work=8), HopCosts())
    two, three = owners[: 2 * shard], owners[2 * shard : 5 * shard]
    assert len(set(two // 2)) == 1
    assert len(set(two)) == 2
    assert len(set(three // 4)) == 1
    assert len(set(three)) == 4
    assert len(set(two // 4) | set(three // 4)) == 2


def test_groups_are_faster_than_all_ranks_for_every_longer_document(monkeypatch):
    costs = measured_costs()
    packs = [np.array(read_histogram().starts(262144, seed)) for seed in range(4)]

    def seconds() -> float:
        placements = [place_documents(starts, 262144, 32, costs=costs) for starts in packs]
        return sum(estimated_time(p.blocks, p.owners, costs) for p in placements)

    in_groups = seconds()
    monkeypatch.setattr(placement_module, "group_sizes", lambda ring_size: [ring_size])
    assert in_groups < 0.98 * seconds()


# ---- the critical path ----


def test_a_rank_may_be_a_hop_ahead_of_its_neighbours():
    assert critical_path(np.array([[3, 0], [0, 3]])) == 3
    # Rank 1 begins hop 1 at 5, so rank 2, which receives from it for hop 1, begins hop 2 then.
    assert critical_path(np.array([[1, 5, 1], [1, 1, 1], [1, 0, 4]])) == 9


def test_even_work_takes_the_mean():
    assert critical_path(np.full((5, 5), 2.0)) == 10


def test_a_hop_waits_for_the_sender_of_its_message():
    compute = np.zeros((4, 4))
    compute[0, 0] = 7  # rank 0 begins hop 1 late
    compute[2, 3] = 1
    # For hop 2 rank 3 exchanges with rank 1, which is in time, for hop 3 with rank 0.
    assert critical_path(compute) == 7
    compute[2] = 0, 0, 1, 0
    # Rank 2 exchanges with rank 0 for hop 2.
    assert critical_path(compute) == 8


def test_a_rank_may_be_as_many_hops_ahead_as_exchanges_are_in_flight():
    compute = np.zeros((4, 4))
    compute[0, 0] = 4
    compute[3, 3] = 2
    # Rank 3 exchanges with rank 0 for hop 3, once that has begun hop 2, or hop 1 (at 4), or hop 0.
    paths = [critical_path(compute, in_flight=number) for number in (1, 2, 3)]
    assert paths == [6, 6, 4]


@pytest.mark.parametrize("in_flight", [1, 2, 3, 9])
def test_more_exchanges_in_flight_never_take_longer_and_never_less_than_the_slowest_rank(in_flight):
    compute = np.random.default_rng(0).random((8, 8))
    path = critical_path(compute, in_flight=in_flight)
    assert compute.sum(0).max() <= path
    assert path <= critical_path(compute, in_flight=max(1, in_flight - 1))


def test_exchanges_of_a_rank_happen_one_after_another():
    transfer = np.repeat([0.0, 3, 2, 1], 4).reshape(4, 4)
    assert critical_path(np.zeros((4, 4)), transfer, in_flight=3) == 3 + 2 + 1


def test_messages_take_time_during_the_hop_before():
    compute = np.full((4, 4), 2.0)
    transfer = np.repeat([0.0, 3, 1, 1], 4).reshape(4, 4)
    assert critical_path(compute, transfer) == 3 + 2 + 2 + 2


# ---- what auto chooses ----


@pytest.mark.parametrize(
    ("starts", "length", "ring_size"),
    [
        ([0], 262144, 8),  # one long document
        ([0], 65536, 32),
        ([0, 5000], 65536, 1),  # a ring of one
        ([0, 100], 1024, 8),  # one block each
    ],
)
def test_spread_is_kept_where_nothing_is_gained(starts, length, ring_size):
    assert place_documents(starts, length, ring_size, costs=measured_costs()) is None


def test_a_placement_is_chosen_only_if_it_is_estimated_to_be_faster():
    costs = measured_costs(row_bytes=4096, bytes_per_second=50e9)
    for seed in range(3):
        starts = read_histogram().starts(32768, seed)
        blocks = SampleBlocks.of(np.array(starts), 32768, 8)
        at_most = 0.98 * estimated_time(blocks, blocks.stripes(), costs)
        times = [estimated_time(blocks, assign(blocks, x, costs), costs) for x in CANDIDATES]
        placement = place_documents(starts, 32768, 8, costs=costs)
        assert (placement is not None) == (min(times) <= at_most)
        if placement:
            assert estimated_time(blocks, placement.owners, costs) == min(times)


# ---- how even, and how little travels, on the published histogram ----


@pytest.mark.parametrize(("ring_size", "most_rows"), [(8, 0.5), (32, 0.6)])
def test_placed_packs_are_even_in_every_hop_and_send_less(ring_size, most_rows):
    costs = measured_costs()
    rows, paths = [], []
    for seed in range(8):
        starts = read_histogram().starts(262144, seed)
        blocks = SampleBlocks.of(np.array(starts), 262144, ring_size)
        placement = place_documents(starts, 262144, ring_size, costs=costs)
        placed = simulate(blocks, placement.owners if placement else blocks.stripes(), costs)
        rows.append(placed.direct.share)
        if placement:
            assert placed.imbalance <= 1.02
            assert placed.tiles_RR.sum() == blocks.tiles.sum()
            paths.append(placed.critical_path() / placed.mean)
    assert len(paths) >= 6
    assert np.mean(paths) <= 1.03
    assert np.mean(rows) <= most_rows
