"""Rings over documents: exact for any documents and any placement, and only read rows are sent."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.placement import Placement
from megatron_ring.context_parallel.sample_blocks import SampleBlocks
from megatron_ring.kernels.attention import KERNELS
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
    )


@st.composite
def owners(draw, blocks: SampleBlocks) -> np.ndarray:
    """Deal the whole blocks to the ranks in any order, and the shorter ones alike."""
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
    )
    expected = oracle.attention(*inputs, visible(case))
    assert beyond_tolerance(run.results, expected, case.dtype) == {}
