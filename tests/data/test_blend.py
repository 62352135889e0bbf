"""Blends: the order of streams, how close each count stays to its weight, and the order within."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.blend import Blend, InterleaveSchedule
from megatron_ring.data.stream import SampleView, Stream
from megatron_ring.data.tokens import TokenStore

some_weight = st.fractions(min_value=0, max_value=10, max_denominator=1000).filter(
    lambda weight: weight > 0
)


class NumberedStream(Stream):
    """A stream whose samples are its name and their number."""

    def __init__(self, store: TokenStore, name: int, seq_length: int = 1):
        self.store = store
        self.name = name
        self.seq_length = seq_length

    def view(self, index: int) -> SampleView:
        return SampleView([np.array([self.name, index])], self.store, vocab_size=100)

    def describe(self) -> list[str]:
        return [f"stream {self.name}"]


def test_weights_of_seven_to_three_give_the_order_computed_by_hand():
    schedule = InterleaveSchedule.of([Fraction("0.7"), Fraction("0.3")])
    order = [schedule.at(index)[0] for index in range(10)]
    assert order == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@given(st.lists(some_weight, min_size=1, max_size=9), st.integers(0, 400))
def test_every_stream_is_read_in_order_and_in_proportion_to_its_weight(weights, samples):
    schedule = InterleaveSchedule.of(weights)
    counts = [0] * len(weights)
    for index in range(samples):
        stream, number = schedule.at(index)
        assert number == counts[stream]
        counts[stream] += 1
    height = (len(weights) - 1).bit_length()
    for count, weight in zip(counts, weights):
        error = abs(count - weight / sum(weights) * samples)
        assert error <= Fraction(height, 2)
        assert error < 1 or len(weights) > 4


@given(st.lists(some_weight, min_size=2, max_size=5), st.integers(0, 10**15))
def test_a_sample_far_into_training_is_found_directly(weights, index):
    """Its number in its stream is still in proportion to the weight."""
    stream, number = InterleaveSchedule.of(weights).at(index)
    assert abs(number - weights[stream] / sum(weights) * index) < 3


@given(st.lists(some_weight, min_size=1, max_size=5), st.integers(1, 50), st.integers(0, 1000))
def test_only_the_ratio_of_weights_matters(weights, factor, index):
    scaled = [factor * weight for weight in weights]
    assert InterleaveSchedule.of(weights).at(index) == InterleaveSchedule.of(scaled).at(index)


def test_a_blend_returns_the_streams_samples_and_describes_their_shares(store_of):
    store = store_of([[1]])
    streams = [NumberedStream(store, 0), NumberedStream(store, 1)]
    blend = Blend(streams, [Fraction(3), Fraction(1)])
    assert [blend.sample(index).tolist() for index in range(4)] == [[0, 0], [0, 1], [1, 0], [0, 2]]
    assert blend.describe() == [
        "75.00% of the samples from stream 0",
        "25.00% of the samples from stream 1",
    ]


def test_streams_of_different_lengths_cannot_be_blended(store_of):
    store = store_of([[1]])
    streams = [NumberedStream(store, 0), NumberedStream(store, 1, seq_length=2)]
    with pytest.raises(AssertionError):
        Blend(streams, [Fraction(1), Fraction(1)])
