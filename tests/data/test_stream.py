"""The text of a sample: any places of it are read alone, and no others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.packing import IGNORED
from megatron_ring.data.stream import Text
from megatron_ring.errors import DataError


@given(
    st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=6),
    st.lists(st.integers(0, 40)).map(sorted),
)
def test_any_places_are_those_of_the_whole(pieces, places):
    text = Text([np.array(piece, np.uint16) for piece in pieces], store=None, vocab_size=100)
    whole = np.array([token for piece in pieces for token in piece] + [IGNORED] * 41)
    found = text.at(np.array(places, np.int64))
    assert found.tolist() == whole[places].tolist()
    assert found.dtype == np.int64


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6), st.integers(0, 40))
def test_a_document_ends_where_its_token_is_and_where_no_text_is(pieces, seq_length):
    text = Text([np.array(piece, np.uint16) for piece in pieces], store=None, vocab_size=100)
    whole = text.at(np.arange(seq_length))
    assert text.ends(1, seq_length).tolist() == ((whole == 1) | (whole == IGNORED)).tolist()


def test_only_the_places_asked_for_are_looked_at(store_of):
    store = store_of([[1, 500, 3], [4, 5]])
    text = Text([store.document(0), store.document(1)], store, vocab_size=100)
    assert text.at(np.array([0, 2, 3])).tolist() == [1, 3, 4]
    with pytest.raises(
        DataError, match=r"P has id 500, .* has 100 ids, 0 to 99\. Set --tokenizer-model"
    ):
        text.at(np.array([1]))
