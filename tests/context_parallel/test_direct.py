"""Rings over documents: exact for any documents and any placement, and only read rows are sent."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.context_parallel import direct
from megatron_ring.context_parallel.hop_cost import direct_buffers
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.placement import Placement, place_samples
from megatron_ring.context_parallel.sample_blocks import SampleBlocks
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.parallel.message_buffers import RowBuffers
from megatron_ring.parallel.peers import peers_in_hop
from tests import oracle, simulated_ring
from tests.fast_kernels import FAST_KERNELS
from tests.tolerances import beyond_tolerance

BLOCK = 8


class Case(NamedTuple):
    """A batch of packed samples in a ring, and how it is computed."""

    layout: Layout
    mask: Mask
    heads: int
    groups: int
    kernel: str
    dtype: torch.dtype
    travels: str
    in_flight: int


@st.composite
def cases(draw) -> Case:
    ring_size = draw(st.integers(1, 8))
    shard = draw(st.integers(1, 4)) * BLOCK + draw(st.sampled_from([0, 0, 1, 5]))
    length = ring_size * shard
    samples = draw(st.integers(1, 2))
    starts, placements = [], []
    for sample in range(samples):
        of_sample = sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=6))})
        starts += [sample * length + start for start in of_sample]
        blocks = SampleBlocks.of(np.array(of_sample), length, ring_size, block=BLOCK)
        is_placed = draw(st.booleans())
        placements.append(Placement(blocks, draw(owners(blocks))) if is_placed else None)
    mask = Mask(
        draw(st.sampled_from([0, 0, 1, 9, length])), tuple(starts), samples, tuple(placements)
    )
    heads, groups = draw(st.sampled_from([(2, 2), (4, 2), (4, 1)]))
    return Case(
        Layout("striped", length, ring_size),
        mask,
        heads,
        groups,
        draw(st.sampled_from(sorted(FAST_KERNELS))),
        draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        draw(st.sampled_from(["keys", "queries"])),
        draw(st.integers(1, 3)),
    )


@st.composite
def owners(draw, blocks: SampleBlocks) -> np.ndarray:
    """Assign the whole blocks to the ranks in any order, and the shorter ones alike."""
    seed = draw(st.integers(0, 1000))
    random = np.random.default_rng(seed)
    ranks = np.arange(blocks.ring_size)
    whole = random.permutation(np.repeat(ranks, blocks.whole_blocks // blocks.ring_size))
    shorter = random.permutation(ranks) if len(blocks) > blocks.whole_blocks else ranks[:0]
    return np.concatenate([whole, shorter])


def visible(case: Case) -> torch.Tensor:
    length = case.layout.seq_length
    begins_BS = torch.zeros(case.mask.samples * length, dtype=torch.int64)
    begins_BS[list(case.mask.document_starts)] = 1
    return oracle.visible(begins_BS.cumsum(0).view(-1, length), case.mask.window)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_documents_and_placements_give_the_attention_of_the_oracle(case):
    inputs = oracle.random_inputs(
        case.mask.samples, case.layout.seq_length, case.heads, case.groups, case.dtype
    )
    run = simulated_ring.run(
        case.layout,
        KERNELS[case.kernel],
        *inputs,
        mask=case.mask,
        sends_queries=lambda q, kv: case.travels == "queries",
        exchanges_in_flight=lambda hops: case.in_flight,
    )
    expected = oracle.attention(*inputs, visible(case))
    assert beyond_tolerance(run.results, expected, case.dtype) == {}


def placed_pack(ring_size: int, length: int) -> tuple[Layout, Mask, Placement]:
    """A long document, then short ones, placed by the rule."""
    layout = Layout("striped", length, ring_size, placement=DocumentPlacement(block=BLOCK))
    starts = [0, *range(length // 2 + 3, length, 2 * BLOCK + 3)]
    [placement] = place_samples(torch.tensor(starts), 1, layout)
    return layout, Mask(document_starts=tuple(starts), placements=(placement,)), placement


@pytest.mark.parametrize("groups", [1, 2], ids=["keys travel", "queries travel"])
def test_a_rank_sends_the_rows_that_are_read_and_no_others(groups):
    """Forward, hop by hop, the bytes are those that ``SampleBlocks`` counts for the placement."""
    ring_size, head_size = 4, 16
    layout, mask, placement = placed_pack(ring_size, 16 * BLOCK * ring_size)
    inputs = oracle.random_inputs(1, layout.seq_length, 2, groups, torch.float32, head_size)
    exchanges = simulated_ring.run(layout, reference, *inputs, mask=mask).exchanges
    rows_RR = placement.blocks.rows_sent_directly(placement.owners)
    bytes_of_row = 2 * groups * head_size * 4
    sent_RT = np.array(exchanges.forward)
    assert np.array_equal(sent_RT, bytes_of_row * rows_RR[1:].T)
    assert 0 < rows_RR.sum() < 0.7 * layout.seq_length * (ring_size - 1)
    if groups == 1:  # Keys of a hop are as many bytes as their gradients, which go back.
        for rank, sent in enumerate(exchanges.backward):
            keys, gradients = sent[:1] + sent[1:-1:2], sent[2:-1:2] + sent[-1:]
            assert keys == exchanges.forward[rank]
            owners = [peers_in_hop(rank, ring_size, hop).sender for hop in range(1, ring_size)]
            came = [exchanges.forward[owner][hop] for hop, owner in enumerate(owners)]
            assert gradients == came


def test_nothing_is_sent_where_every_document_is_whole_on_a_rank():
    layout = Layout("striped", 64, 4)
    starts = tuple(range(0, 64, BLOCK))
    blocks = SampleBlocks.of(np.array(starts), 64, 4, block=BLOCK)
    mask = Mask(document_starts=starts, placements=(Placement(blocks, np.arange(8) % 4),))
    inputs = oracle.random_inputs(1, 64, 2, 2, torch.float32)
    run = simulated_ring.run(layout, reference, *inputs, mask=mask)
    assert sum(map(sum, run.exchanges.forward)) == sum(map(sum, run.exchanges.backward)) == 0
    document_BS = torch.arange(64).div(BLOCK, rounding_mode="floor")[None]
    expected = oracle.attention(*inputs, oracle.visible(document_BS))
    assert beyond_tolerance(run.results, expected, torch.float32) == {}


def test_every_read_row_is_sent_where_one_document_is_all_there_is():
    """A ring over one document sends as much as one that forwards."""
    layout = Layout("zigzag", 64, 4)
    inputs = oracle.random_inputs(1, 64, 4, 1, torch.float32)
    one, forwarded = (
        simulated_ring.run(layout, reference, *inputs, mask=mask).exchanges
        for mask in (Mask(document_starts=(0,)), Mask())
    )
    assert sum(map(sum, one.forward)) <= sum(map(sum, forwarded.forward))
    assert sum(map(sum, one.backward)) <= sum(map(sum, forwarded.backward))


@pytest.mark.parametrize("travels", ["keys", "queries"])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("ring_size", [2, 3, 6])
def test_a_ring_has_as_many_message_buffers_as_the_memory_plan_counts(
    ring_size, in_flight, travels, monkeypatch
):
    made = []

    class Counted(RowBuffers):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(direct, "RowBuffers", Counted)
    # The first block of every rank is a document of its own, so no shard is sent as a whole, which
    # takes no buffer.
    starts = tuple(range(0, BLOCK * ring_size + 1, BLOCK))
    blocks = SampleBlocks.of(np.array(starts), 4 * BLOCK * ring_size, ring_size, block=BLOCK)
    placement = Placement(blocks, np.tile(np.arange(ring_size), 4))
    mask = Mask(document_starts=starts, placements=(placement,))
    simulated_ring.run(
        Layout("striped", blocks.seq_length, ring_size),
        reference,
        *oracle.random_inputs(1, blocks.seq_length, 1, 1, torch.float32),
        mask=mask,
        sends_queries=lambda q, kv: travels == "queries",
        exchanges_in_flight=lambda hops: in_flight,
    )
    # Of keys forward, of what travels backward, and of its gradients.
    planned = 3 * ring_size * direct_buffers(ring_size, in_flight)
    assert sum(len(buffers._buffers) for buffers in made) == planned
