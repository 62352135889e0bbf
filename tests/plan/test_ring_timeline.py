"""Counted work per hop, the critical path, and how balance improves it."""

import pytest
import torch

from benchmarks.document_packs import random_starts
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.context_parallel.visible_rows import are_sent_directly
from megatron_ring.parallel.peers import peers_in_hop
from megatron_ring.plan.ring_timeline import (
    Timeline,
    bound_over_ring,
    visible_pairs_per_hop,
    visible_pairs_per_rank,
)

SMALL = [
    Layout("none", 9, 1),
    Layout("ring", 12, 3),
    Layout("striped", 12, 3),
    Layout("striped", 24, 3, stripe_size=4),
    Layout("zigzag", 24, 4),
]


MASKS = [
    CAUSAL,
    Mask(window=4),
    Mask(document_starts=(0, 1, 7)),
    Mask(window=4, document_starts=(0, 1, 7)),
]


def is_visible(query: int, key: int, mask: Mask) -> bool:
    start = max((start for start in mask.document_starts if start <= query), default=0)
    return max(start, query - mask.window + 1 if mask.window else 0) <= key <= query


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_the_work_of_a_hop_is_its_visible_pairs(layout, mask):
    def keys_of(rank: int, hop: int) -> int:
        if are_sent_directly(layout, mask):
            return peers_in_hop(rank, layout.ring_size, hop).sender
        return (rank - hop) % layout.ring_size

    pairs = [
        [
            sum(
                is_visible(query, key, mask)
                for query in layout.positions(rank).tolist()
                for key in layout.positions(keys_of(rank, hop)).tolist()
            )
            for rank in range(layout.ring_size)
        ]
        for hop in range(layout.ring_size)
    ]
    timeline = visible_pairs_per_hop(layout, mask)
    assert timeline.work_RR.tolist() == pairs
    assert visible_pairs_per_rank(layout, mask).tolist() == timeline.work_RR.sum(dim=0).tolist()


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_the_pairs_of_all_hops_add_up_to_the_causal_triangle(layout):
    assert (
        visible_pairs_per_hop(layout).work_RR.sum()
        == layout.seq_length * (layout.seq_length + 1) / 2
    )


def test_the_time_in_lockstep_is_the_sum_of_the_slowest_ranks():
    timeline = Timeline(torch.tensor([[1.0, 3.0], [5.0, 2.0]], dtype=torch.float64))
    assert timeline.lockstep_time == 3 + 5
    assert timeline.imbalance == 6 / 5.5
    assert timeline.gain_of_balance == (3 + 5) / 5.5


@pytest.mark.parametrize("ring_size", [2, 4, 8])
@pytest.mark.parametrize("name", ["striped", "zigzag"])
def test_balanced_layouts_nearly_reach_the_bound_over_the_contiguous_ring(name, ring_size):
    ring, balanced = (
        visible_pairs_per_hop(Layout(layout, ring_size * 4096, ring_size))
        for layout in ("ring", name)
    )
    gain, bound = ring.lockstep_time / balanced.lockstep_time, bound_over_ring(name, ring_size)
    assert bound == 2 - 1 / ring_size
    assert 0.999 * bound < gain <= bound


@pytest.mark.parametrize("ring_size", [2, 4, 8])
def test_the_bound_is_the_gain_of_balance_of_the_contiguous_ring(ring_size):
    ring = visible_pairs_per_hop(Layout("ring", ring_size * 4096, ring_size))
    assert ring.gain_of_balance == pytest.approx(bound_over_ring("striped", ring_size), rel=1e-3)


def test_the_contiguous_ring_gains_nothing_over_itself():
    assert bound_over_ring("ring", 16) == 1


@pytest.mark.parametrize("name", ["striped", "zigzag"])
def test_sixteen_ranks_share_sixteen_thousand_tokens_evenly(name):
    assert visible_pairs_per_hop(Layout(name, 16384, 16)).imbalance <= 1.01


def test_contiguous_shards_leave_the_last_rank_nearly_twice_the_mean():
    assert visible_pairs_per_hop(Layout("ring", 16384, 16)).imbalance == pytest.approx(
        2 - 1 / 16, rel=1e-3
    )


def test_only_stripes_balance_packed_documents():
    seq_length, ring_size = 65536, 8
    mask = Mask(document_starts=random_starts(1024, seq_length))
    imbalance = {
        n: visible_pairs_per_hop(Layout(n, seq_length, ring_size), mask).imbalance
        for n in ("ring", "striped", "zigzag")
    }
    assert imbalance["striped"] <= 1.01
    assert min(imbalance["ring"], imbalance["zigzag"]) > 1.2
