"""Whole documents in samples: which places hold text, what the last token predicts, and what an epoch holds."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.bin_packing import FITS
from megatron_ring.data.packing import IGNORED
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import DataError

S = 6
every_fit = pytest.mark.parametrize("fit", FITS)


def stream_of(
    store, fit: str, seq_length: int = S, seed: int = 1, vocab_size: int = 65536
) -> WholeDocumentStream:
    return WholeDocumentStream(store, range(len(store)), seq_length, seed, vocab_size, fit)


def epoch(stream: WholeDocumentStream, number: int = 0) -> list[list[int]]:
    first = number * stream.samples_per_epoch
    return [
        stream.sample(index).tolist() for index in range(first, first + stream.samples_per_epoch)
    ]


@every_fit
def test_what_a_short_document_leaves_holds_no_text(store_of, fit):
    stream = stream_of(store_of([[1, 2, 3, 4]]), fit)
    assert epoch(stream) == [[1, 2, 3, 4, IGNORED, IGNORED, IGNORED]]
    assert stream.sample(0).dtype == np.int64
    assert stream.lost_share == pytest.approx(2 / 6)


@every_fit
def test_a_document_that_fills_the_sample_ends_it_and_predicts_nothing_behind(store_of, fit):
    stream = stream_of(store_of([range(6)]), fit)
    assert epoch(stream) == [[0, 1, 2, 3, 4, 5, IGNORED]]
    assert stream.lost_share == 0


@every_fit
def test_a_longer_document_is_cut_and_the_cut_predicts_what_follows(store_of, fit):
    stream = stream_of(store_of([range(14)]), fit)
    assert sorted(epoch(stream), reverse=True) == [
        [12, 13, *[IGNORED] * 5],
        [6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_best_fit_finds_what_goes_together(store_of):
    """Lengths 4, 4, 2, 2 in whatever order: next-fit may leave room, best-fit leaves none."""
    store = store_of([[1] * 4, [2] * 4, [3] * 2, [4] * 2])
    assert stream_of(store, "best-fit").lost_share == 0
    assert max(stream_of(store, "greedy", seed=seed).lost_share for seed in range(5)) > 0


@every_fit
@given(lengths=st.lists(st.integers(0, 15), min_size=1).filter(any), seed=st.integers(0, 2**32))
def test_an_epoch_holds_every_token_once_in_whole_documents(store_of, fit, lengths, seed):
    starts = np.cumsum([0, *lengths])
    stream = stream_of(
        store_of([range(start, start + n) for start, n in zip(starts, lengths)]), fit, seed=seed
    )
    for number in (0, 1):
        texts = [
            [token for token in sample[:-1] if token != IGNORED] for sample in epoch(stream, number)
        ]
        assert sorted(chain.from_iterable(texts)) == list(range(sum(lengths)))
        for text in texts:
            # A run of text begins where a document does, or S tokens, a whole sample, behind that.
            breaks = [0, *(i for i in range(1, len(text)) if text[i] != text[i - 1] + 1)]
            begins = [
                text[at] - starts[np.searchsorted(starts, text[at], side="right") - 1]
                for at in breaks
            ]
            assert all(begin % S == 0 for begin in begins)
    assert stream.lost_share == pytest.approx(1 - sum(lengths) / (stream.samples_per_epoch * S))


@every_fit
def test_epochs_differ_in_order_and_any_sample_is_found_at_once(store_of, fit):
    store = store_of([range(20 * i, 20 * i + 1 + i % 9) for i in range(40)])
    stream = stream_of(store, fit, seed=7)
    first, second = epoch(stream, 0), epoch(stream, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    backwards = [
        stream.sample(index).tolist() for index in reversed(range(2 * stream.samples_per_epoch))
    ]
    assert backwards[::-1] == first + second
    assert epoch(stream_of(store, fit, seed=8)) != first


@every_fit
def test_only_the_documents_of_the_range_are_met(store_of, fit):
    stream = WholeDocumentStream(
        store_of([[1] * 9, [2] * 9, [3] * 9]), range(1, 2), 4, seed=1, vocab_size=10, fit=fit
    )
    assert {token for sample in epoch(stream) for token in sample} == {2, IGNORED}


def test_an_id_that_the_tokenizer_does_not_have_is_refused(store_of):
    """Even -100, which stands for a place without text."""
    stream = stream_of(store_of([[1, IGNORED, 3]], np.int32), "greedy", vocab_size=320)
    with pytest.raises(
        DataError, match=r"P has id -100, .* has 320 ids, 0 to 319\. Set --tokenizer-model"
    ):
        stream.sample(0)


def test_what_fill_costs_is_told(store_of):
    stream = stream_of(store_of([[1, 2, 3, 4]]), "best-fit")
    (line,) = stream.in_words()
    assert line.endswith(
        "P: 1 training samples an epoch of whole documents (best-fit), 33.33% of their tokens lost to fill"
    )
