"""Whole documents in samples: padding, the last token's target, and the content of an epoch."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.bin_packing import PACKERS
from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import DataError
from tests.data.test_samples import epoch

S = 6
every_fit = pytest.mark.parametrize("fit", PACKERS)


def stream_of(
    store, fit: str, seq_length: int = S, seed: int = 1, vocab_size: int = 65536
) -> WholeDocumentStream:
    return WholeDocumentStream(store, range(len(store)), seq_length, seed, vocab_size, fit)


@every_fit
def test_a_short_document_is_followed_by_padding(store_of, fit):
    stream = stream_of(store_of([[1, 2, 3, 4]]), fit)
    assert epoch(stream) == [[1, 2, 3, 4, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert stream.sample(0).dtype == np.int64
    assert stream.padding_share == pytest.approx(2 / 6)


@every_fit
def test_the_last_token_of_a_document_that_fills_the_sample_has_no_target(store_of, fit):
    stream = stream_of(store_of([range(6)]), fit)
    assert epoch(stream) == [[0, 1, 2, 3, 4, 5, IGNORE_INDEX]]
    assert stream.padding_share == 0


@every_fit
def test_a_long_document_is_cut_and_the_token_at_the_cut_has_a_target(store_of, fit):
    stream = stream_of(store_of([range(14)]), fit)
    assert sorted(epoch(stream), reverse=True) == [
        [12, 13, *[IGNORE_INDEX] * 5],
        [6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_best_fit_combines_lengths_that_fill_a_sample(store_of):
    """Lengths 4, 4, 2, 2 in any order: next-fit may leave padding, best-fit leaves none."""
    store = store_of([[1] * 4, [2] * 4, [3] * 2, [4] * 2])
    assert stream_of(store, "best-fit").padding_share == 0
    assert max(stream_of(store, "greedy", seed=seed).padding_share for seed in range(5)) > 0


@every_fit
@given(lengths=st.lists(st.integers(0, 15), min_size=1).filter(any), seed=st.integers(0, 2**32))
def test_an_epoch_has_every_token_once_in_whole_documents(store_of, fit, lengths, seed):
    starts = np.cumsum([0, *lengths])
    documents = [range(start, start + n) for start, n in zip(starts, lengths)]
    stream = stream_of(store_of(documents), fit, seed=seed)
    for number in (0, 1):
        texts = [
            [token for token in sample[:-1] if token != IGNORE_INDEX]
            for sample in epoch(stream, number)
        ]
        assert sorted(chain.from_iterable(texts)) == list(range(sum(lengths)))
        for text in texts:
            # A run of consecutive tokens begins where a document does, or a multiple of S later.
            breaks = [0, *(i for i in range(1, len(text)) if text[i] != text[i - 1] + 1)]
            for i in breaks:
                document = np.searchsorted(starts, text[i], side="right") - 1
                assert (text[i] - starts[document]) % S == 0
    assert stream.padding_share == pytest.approx(1 - sum(lengths) / (stream.samples_per_epoch * S))


@every_fit
def test_epochs_differ_in_order_only_and_any_sample_is_found_directly(store_of, fit):
    store = store_of([range(20 * i, 20 * i + 1 + i % 9) for i in range(40)])
    stream = stream_of(store, fit, seed=7)
    first = epoch(stream, 0)
    second = epoch(stream, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    indices = reversed(range(2 * stream.samples_per_epoch))
    read_backwards = [stream.sample(index).tolist() for index in indices]
    assert read_backwards[::-1] == first + second
    assert epoch(stream_of(store, fit, seed=8)) != first


@every_fit
def test_only_documents_of_the_range_are_read(store_of, fit):
    store = store_of([[1] * 9, [2] * 9, [3] * 9])
    stream = WholeDocumentStream(store, range(1, 2), 4, seed=1, vocab_size=10, fit=fit)
    assert {token for sample in epoch(stream) for token in sample} == {2, IGNORE_INDEX}


def test_an_id_outside_the_vocabulary_is_refused(store_of):
    """Even -100, which marks padding in a sample."""
    stream = stream_of(store_of([[1, IGNORE_INDEX, 3]], np.int32), "greedy", vocab_size=320)
    with pytest.raises(
        DataError, match=r"P has id -100, .* has 320 ids, 0 to 319\. Set --tokenizer-model"
    ):
        stream.sample(0)


def test_the_share_of_padding_is_described(store_of):
    stream = stream_of(store_of([[1, 2, 3, 4]]), "best-fit")
    (line,) = stream.describe()
    assert "P: 1 training sample an epoch" in line
    assert "(best-fit), 33.33% padding" in line
