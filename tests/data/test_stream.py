"""Sample views: any positions of a sample are read, and no others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.data.stream import SampleView
from megatron_ring.errors import DataError


def view_of(pieces: list[list[int]]) -> SampleView:
    arrays = [np.array(piece, np.uint16) for piece in pieces]
    return SampleView(arrays, store=None, vocab_size=100)


@given(
    st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=6),
    st.lists(st.integers(0, 40)).map(sorted),
)
def test_tokens_at_any_positions_are_those_of_the_whole_sample(pieces, positions):
    whole = np.array([token for piece in pieces for token in piece] + [IGNORE_INDEX] * 41)
    tokens = view_of(pieces).tokens_at(np.array(positions, np.int64))
    assert tokens.tolist() == whole[positions].tolist()
    assert tokens.dtype == np.int64


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6), st.integers(0, 40))
def test_document_ends_are_end_tokens_and_padding(pieces, seq_length):
    view = view_of(pieces)
    whole = view.tokens_at(np.arange(seq_length))
    expected = (whole == 1) | (whole == IGNORE_INDEX)
    assert view.document_ends(1, seq_length).tolist() == expected.tolist()


def test_only_the_requested_positions_are_checked_for_unknown_ids(store_of):
    store = store_of([[1, 500, 3], [4, 5]])
    view = SampleView([store.document(0), store.document(1)], store, vocab_size=100)
    assert view.tokens_at(np.array([0, 2, 3])).tolist() == [1, 3, 4]
    with pytest.raises(DataError, match=r"P has id 500, .* 100 ids, 0 to 99\. .*--tokenizer-model"):
        view.tokens_at(np.array([1]))
