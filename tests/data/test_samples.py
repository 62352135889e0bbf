"""Splits and samples: every token once an epoch, in an order set by (seed, epoch) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.samples import SampleStream, split_documents
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import DataError


def stream_of(store, seq_length: int, seed: int = 1, vocab_size: int = 65536) -> SampleStream:
    return SampleStream(store, range(len(store)), seq_length, seed, vocab_size)


def epoch(stream: SampleStream | WholeDocumentStream, number: int = 0) -> list[list[int]]:
    """All samples of one epoch."""
    first = number * stream.samples_per_epoch
    indices = range(first, first + stream.samples_per_epoch)
    return [stream.sample(index).tolist() for index in indices]


def test_training_gets_the_first_documents():
    assert split_documents(np.full(10, 100), (0.8, 0.2), seq_length=16) == [range(8), range(8, 10)]


def test_a_share_of_0_is_an_empty_range():
    assert split_documents(np.full(3, 100), (1.0, 0.0), seq_length=16) == [range(3), range(3, 3)]


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ((0.7, 0.2, 0.1), [range(7), range(7, 9), range(9, 10)]),
        ((0.9, 0.0, 0.1), [range(9), range(9, 9), range(9, 10)]),
        ((0.8, 0.2, 0.0), [range(8), range(8, 10), range(10, 10)]),
    ],
)
def test_of_three_shares_the_test_gets_the_last_documents(split, parts):
    assert split_documents(np.full(10, 100), split, seq_length=16) == parts


def test_shares_that_miss_1_by_rounding_cover_all_documents():
    """And a share of 0 still gets none."""
    lengths = np.full(10_000_000, 20)
    training, validation, test = split_documents(lengths, (0.9, 0.0999995, 0.0), seq_length=16)
    assert (training.stop, validation.stop, len(test)) == (validation.start, 10_000_000, 0)


def test_the_error_for_a_part_without_documents_has_its_numbers():
    message = (
        r"^validation: a share of 0.02 of 10 documents is 0 documents with 0 tokens, .* takes 17"
    )
    with pytest.raises(DataError, match=message):
        split_documents(np.full(10, 100), (0.98, 0.02), seq_length=16)


def test_a_test_share_without_documents_is_named():
    with pytest.raises(
        DataError, match=r"^test: a share of 0.01 of 10 documents is 0 documents with 0 tokens"
    ):
        split_documents(np.full(10, 100), (0.79, 0.2, 0.01), seq_length=16)


def test_every_part_with_too_few_tokens_is_named_with_its_longest_legal_seq_length():
    with pytest.raises(
        DataError, match=r"(?s)^training: .*--seq-length to at most 79.*validation: .*at most 19"
    ):
        split_documents(np.full(10, 10), (0.8, 0.2), seq_length=128)


def test_a_sample_has_seq_length_plus_1_tokens(store_of):
    stream = stream_of(store_of([range(9)]), seq_length=8)
    assert stream.samples_per_epoch == 1
    assert stream.sample(0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert stream.sample(0).dtype == np.int64


def test_neighbouring_samples_share_one_token(store_of):
    stream = stream_of(store_of([range(11)]), seq_length=4)
    assert sorted(epoch(stream)) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_documents_are_joined_without_loss(store_of):
    stream = stream_of(store_of([[1, 2, 3], [4, 5], [6, 7]]), seq_length=6)
    joined = stream.sample(0).tolist()
    assert sorted(joined) == [1, 2, 3, 4, 5, 6, 7]
    assert joined.index(3) == joined.index(2) + 1 == joined.index(1) + 2
    assert joined.index(5) == joined.index(4) + 1


@given(
    lengths=st.lists(st.integers(0, 12)).filter(lambda lengths: sum(lengths) > 5),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_has_every_token_once_except_the_last_few(store_of, lengths, seed):
    tokens = iter(range(sum(lengths)))
    documents = [[next(tokens) for _ in range(length)] for length in lengths]
    stream = stream_of(store_of(documents), 5, seed)
    for number in (0, 1):
        inputs = [token for sample in epoch(stream, number) for token in sample[:-1]]
        assert len(set(inputs)) == len(inputs) == 5 * stream.samples_per_epoch
        assert 0 <= sum(lengths) - 1 - len(inputs) < 5


def test_the_second_epoch_reorders_documents_and_samples(store_of):
    documents = [range(100 * i, 100 * i + 10) for i in range(20)]
    stream = stream_of(store_of(documents), seq_length=20)
    first = epoch(stream, 0)
    second = epoch(stream, 1)
    assert [sample[0] for sample in first] != [sample[0] for sample in second]
    assert sorted(first) != sorted(second)


def test_the_order_depends_on_the_seed_and_not_on_earlier_reads(store_of):
    store = store_of([range(50), range(100, 150), range(200, 250)])
    stream = stream_of(store, 10, seed=7)
    read_backwards = [stream.sample(index).tolist() for index in reversed(range(30))]
    fresh = [stream_of(store, 10, seed=7).sample(index).tolist() for index in range(30)]
    assert fresh == read_backwards[::-1]
    assert epoch(stream_of(store, 10, seed=8)) != epoch(stream)


def test_the_order_is_the_same_on_every_machine(store_of):
    stream = stream_of(store_of([range(33)]), seq_length=4, seed=1234)
    assert [int(stream.sample(index)[0]) for index in range(8)] == [24, 12, 20, 8, 4, 16, 0, 28]


def test_only_documents_of_the_range_are_read(store_of):
    store = store_of([[1] * 9, [2] * 9, [3] * 9])
    stream = SampleStream(store, range(1, 2), seq_length=4, seed=1, vocab_size=10)
    assert {token for sample in epoch(stream) for token in sample} == {2}


@pytest.mark.parametrize("unknown", [320, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_its_location(store_of, unknown):
    stream = stream_of(store_of([[1, 2], [3, unknown, 5]], np.int32), seq_length=4, vocab_size=320)
    where = r"in document 1 at byte 12 of .*P\.bin"
    with pytest.raises(
        DataError, match=rf"P has id {unknown}, {where}, .* has 320 ids, 0 to 319\. .* --verify"
    ):
        stream.sample(0)
