"""Simulated rings over placements: work, critical path and the rows of both ways."""

import numpy as np
import pytest

from megatron_ring.context_parallel.sample_blocks import BLOCK, HopCosts, SampleBlocks
from megatron_ring.plan.placement_simulation import simulate

COSTS = HopCosts(tile=1, query_tile=10, row=0.25)


def test_documents_on_their_own_ranks_send_nothing_and_leave_out_all_hops():
    blocks = SampleBlocks.of(np.arange(4) * 2 * BLOCK, 8 * BLOCK, 4)
    ring = simulate(blocks, blocks.contiguous(), COSTS)
    assert (ring.direct.share, ring.forwarded.share) == (0, 0)
    assert ring.direct.hops_left_out == 3
    assert ring.imbalance == 1
    # Two query tiles, which visit one tile and two.
    assert ring.critical_path() == ring.mean == 3 + 2 * 10


def test_one_document_over_contiguous_shards_sends_rows_to_later_ranks_only():
    blocks = SampleBlocks.of(np.array([0]), 4 * BLOCK, 4)
    ring = simulate(blocks, blocks.contiguous(), COSTS)
    assert ring.direct.share == pytest.approx((3 + 2 + 1) / (4 * 3))
    assert ring.forwarded.share == ring.direct.share
    assert ring.direct.share_of_most == 1
    # Forwarded, rank 2 sends the rows of ranks 0 and 1 besides its own, as far as rank 3.
    assert ring.forwarded.rows_RR.sum(0).tolist() == [BLOCK, 2 * BLOCK, 3 * BLOCK, 0]
    assert ring.direct.rows_RR.sum(0).tolist() == [3 * BLOCK, 2 * BLOCK, BLOCK, 0]
    assert ring.imbalance == pytest.approx(4 / 2.5)


def test_forwarded_rows_pass_ranks_that_do_not_read_them():
    blocks = SampleBlocks.of(np.array([0, 2 * BLOCK, 3 * BLOCK]), 4 * BLOCK, 4)
    owners = np.array([0, 3, 1, 2])
    ring = simulate(blocks, owners, COSTS)
    assert ring.direct.rows_RR.sum() == BLOCK
    assert ring.forwarded.rows_RR.sum() == 3 * BLOCK
    assert ring.direct.hops_left_out == 2
    assert ring.forwarded.hops_left_out == 0


def test_messages_lengthen_the_critical_path_only_where_they_are_not_hidden():
    blocks = SampleBlocks.of(np.array([0]), 8 * BLOCK, 2)
    owners = blocks.stripes()
    ring = simulate(blocks, owners, COSTS)
    hidden = simulate(blocks, owners, HopCosts(tile=1, query_tile=10, row=1e-6))
    assert hidden.critical_path(with_transfers=True) == hidden.critical_path()
    longest = ring.direct.rows_RR[1].max() * COSTS.row
    assert ring.critical_path(with_transfers=True) >= longest
    assert ring.critical_path(with_transfers=True) > ring.critical_path()


def test_a_ring_of_one_sends_nothing():
    blocks = SampleBlocks.of(np.array([0, 5]), 2 * BLOCK, 1)
    ring = simulate(blocks, blocks.stripes(), COSTS)
    assert ring.direct.share == 0
    assert ring.critical_path() == ring.mean
