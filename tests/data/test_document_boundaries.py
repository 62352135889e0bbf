"""Document boundaries: found by end-of-document tokens, and compared with a loop over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from megatron_ring.data.document_boundaries import IGNORE_INDEX, NO_BOUNDARIES, DocumentBoundaries
from megatron_ring.engine.loss_and_norm import counted_tokens

END = 0
ALL = DocumentBoundaries(
    END, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True
)


def all_positions(boundaries: DocumentBoundaries, tokens_BS: np.ndarray) -> np.ndarray:
    """The positions of every token of whole samples."""
    return boundaries.positions(tokens_BS == END, np.arange(tokens_BS.shape[1]))


def token_by_token(samples: list[list[int]]) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Document starts, positions and targets of samples of S+1 tokens, computed one by one."""
    starts, positions, targets = [], [], []
    for b, sample in enumerate(samples):
        seq_length = len(sample) - 1
        start = 0
        positions.append([])
        targets.append([])
        for p in range(seq_length):
            if p == 0 or sample[p - 1] == END:
                start = p
                starts.append(b * seq_length + p)
            positions[b].append(p - start)
            targets[b].append(-100 if sample[p] == END else sample[p + 1])
    return starts, positions, targets


@pytest.mark.parametrize(
    ("tokens", "starts", "positions"),
    [
        pytest.param([1, 2, 3, 4, 5, 6], [0], [0, 1, 2, 3, 4, 5], id="no end"),
        pytest.param(
            [1, 2, 3, 4, 5, END], [0], [0, 1, 2, 3, 4, 5], id="fills the sample: no start after it"
        ),
        pytest.param([1, 2, 3, 4, END, 6], [0, 5], [0, 1, 2, 3, 4, 0], id="one token of the next"),
        pytest.param([1, 2, END, 4, 5, 6], [0, 3], [0, 1, 2, 0, 1, 2], id="cut at both edges"),
        pytest.param(
            [END, 2, 3, END, 5, 6], [0, 1, 4], [0, 0, 1, 2, 0, 1], id="ends with the first token"
        ),
        pytest.param([1, END, END, 4, 5, 6], [0, 2, 3], [0, 1, 0, 0, 1, 2], id="two ends in a row"),
        pytest.param([END] * 6, [0, 1, 2, 3, 4, 5], [0] * 6, id="one token each"),
        pytest.param([1], [0], [0], id="a sample of one token"),
        pytest.param([END], [0], [0], id="a sample of one end"),
    ],
)
def test_a_document_begins_at_0_and_after_every_end(tokens, starts, positions):
    assert ALL.document_starts(np.array([tokens]) == END).tolist() == starts
    assert all_positions(ALL, np.array([tokens])).tolist() == [positions]


def test_every_sample_of_a_batch_begins_a_document():
    tokens_BS = np.array([[1, END, 3, 4], [5, 6, 7, END], [8, 9, END, 1]])
    assert ALL.document_starts(tokens_BS == END).tolist() == [0, 2, 4, 8, 11]
    assert all_positions(ALL, tokens_BS).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]


def test_an_end_token_has_no_target_and_is_a_target_itself():
    targets_BS = ALL.targets(np.array([[1, END, 3, 4]]), np.array([[END, 3, 4, END]]))
    assert targets_BS.tolist() == [[END, IGNORE_INDEX, 4, END]]
    assert counted_tokens(torch.from_numpy(targets_BS)) == 3


def test_without_flags_a_sample_is_one_document():
    tokens_BS = np.array([[1, END, 3, 4], [5, 6, 7, END]])
    next_BS = np.array([[END, 3, 4, 5], [6, 7, END, 8]])
    for boundaries in (NO_BOUNDARIES, DocumentBoundaries(END)):
        assert boundaries.document_starts(tokens_BS == END) is None
        assert all_positions(boundaries, tokens_BS).tolist() == [0, 1, 2, 3]
        assert boundaries.targets(tokens_BS, next_BS).tolist() == next_BS.tolist()


def test_all_results_are_int64():
    tokens_BS = np.array([[1, END, 3, 4]])
    results = (
        ALL.document_starts(tokens_BS == END),
        all_positions(ALL, tokens_BS),
        ALL.targets(tokens_BS, tokens_BS),
        all_positions(NO_BOUNDARIES, tokens_BS),
    )
    assert {array.dtype for array in results} == {np.dtype(np.int64)}


# One end in three tokens on average: runs of ends as well as long documents.
@given(
    arrays(
        np.int64,
        array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=40),
        elements=st.integers(0, 2),
    )
)
def test_any_samples_equal_the_loop_over_tokens(samples):
    tokens_BS = samples[:, :-1]
    next_BS = samples[:, 1:]
    starts, positions, targets = token_by_token(samples.tolist())
    assert ALL.document_starts(tokens_BS == END).tolist() == starts
    assert all_positions(ALL, tokens_BS).tolist() == positions
    assert ALL.targets(tokens_BS, next_BS).tolist() == targets
