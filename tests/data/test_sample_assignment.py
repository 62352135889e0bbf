"""Samples assigned by work: the same samples, and data ranks that are about even."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.document_histogram import read_histogram
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.data.document_boundaries import DocumentBoundaries
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.sample_assignment import by_work, imbalance, in_order, visible_pairs
from megatron_ring.data.samples import SampleStream

END = 0
S = 32
SAMPLES = 8


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("lengths", [[16], [1, 2, 13], [4, 4, 8]], ids=str)
def test_visible_pairs_are_those_of_the_mask(lengths, window):
    starts = np.cumsum([0, *lengths[:-1]])
    ranges = hop_key_ranges(Layout("none", 16, 1), 0, 0, Mask(window, tuple(starts.tolist())))
    assert visible_pairs(np.array(lengths), window) == ranges.visible_pairs


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_every_sample_has_one_slot_and_equal_samples_keep_their_order(data, micro, rows, seed):
    work = np.random.default_rng(seed).pareto(1.0, data * micro * rows)
    assert sorted(by_work(work, data, rows)) == list(range(len(work)))
    if rows == 1:
        assert by_work(np.ones(len(work)), data, rows).tolist() == list(range(len(work)))


def test_data_ranks_are_about_even_on_real_lengths_in_the_step_and_in_every_micro_batch():
    """16 steps of 64 samples on 8 data ranks; in order the slowest rank has twice the mean."""
    histogram = read_histogram()
    assigned, as_they_come, of_micro_batches = [], [], []
    for step in range(16):
        work = np.array(
            [
                visible_pairs(np.diff([*histogram.starts(16384, 64 * step + n), 16384]))
                for n in range(64)
            ],
            dtype=float,
        )
        slots = by_work(work, 8, 2)
        assigned.append(imbalance(work, slots, 8, 2))
        as_they_come.append(imbalance(work, in_order(64), 8, 2))
        load_MD = work[slots].reshape(-1, 8, 2).sum(2)
        of_micro_batches.append(load_MD.max(1).sum() / load_MD.mean(1).sum())
    assert np.mean(as_they_come) > 1.3
    assert np.mean(assigned) < 1.05
    assert np.mean(of_micro_batches) < 1.3


@pytest.fixture(scope="module")
def stream(store_of) -> SampleStream:
    lengths = [60, 3, 9, 5, 4, 40, 8, 2, 7, 20] * 4
    documents = [[*range(1, n), END] for n in lengths]
    return SampleStream(store_of(documents), range(40), seq_length=S, seed=5, vocab_size=65536)


def batches(stream: SampleStream, data_size: int, rows: int, **options) -> list[list[Batch]]:
    """Return the second step of each data rank."""
    boundaries = DocumentBoundaries(END, reset_attention_mask=True)
    layout = Layout("none", S, 1)
    return [
        Loader(
            stream, layout, 0, rank, data_size, rows, SAMPLES, SAMPLES, boundaries, **options
        ).next_step()
        for rank in range(data_size)
    ]


@pytest.mark.parametrize(("data_size", "rows"), [(1, 2), (2, 1), (4, 2)])
def test_a_step_has_the_same_samples_in_either_assignment(stream, data_size, rows):
    def samples(of_ranks: list[list[Batch]]) -> list[tuple]:
        tokens = torch.cat([batch.tokens_Bl for step in of_ranks for batch in step])
        return sorted(map(tuple, tokens.tolist()))

    by_rank = batches(stream, data_size, rows, assigns_by_work=True)
    assert samples(by_rank) == samples(batches(stream, data_size, rows))


def test_the_imbalance_of_a_step_is_that_of_its_batches(stream):
    for assigns in (False, True):
        of_ranks = batches(stream, 4, 1, assigns_by_work=assigns)
        pairs = [
            sum(visible_pairs(batch.document_lengths(S).numpy()) for batch in of_rank)
            for of_rank in of_ranks
        ]
        found = {batch.data_imbalance for of_rank in of_ranks for batch in of_rank}
        assert len(found) == 1
        assert found.pop().assigned == pytest.approx(max(pairs) / np.mean(pairs))
    assert of_ranks[0][0].data_imbalance.assigned < of_ranks[0][0].data_imbalance.in_order


def test_one_data_rank_has_no_imbalance(stream):
    assert batches(stream, 1, 2, assigns_by_work=True)[0][0].data_imbalance is None
