"""Blends: whose turn it is, how near every count stays to its weight, and that each stream is met in order."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.mixture import Blend, InterleaveSchedule
from megatron_ring.data.stream import Stream, Text
from megatron_ring.data.tokens import TokenStore

weights_of = st.fractions(min_value=0, max_value=10, max_denominator=1000).filter(
    lambda weight: weight > 0
)


class Numbered(Stream):
    """A stream whose samples tell which they are."""

    def __init__(self, store: TokenStore, name: int, seq_length: int = 1):
        self.store, self.name, self.seq_length = store, name, seq_length

    def text(self, index: int) -> Text:
        return Text([np.array([self.name, index])], self.store, vocab_size=100)

    def in_words(self) -> list[str]:
        return [f"stream {self.name}"]


def test_seven_to_three_by_hand():
    turns = InterleaveSchedule.of([Fraction("0.7"), Fraction("0.3")])
    order = [turns.at(index)[0] for index in range(10)]
    assert order == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


@given(st.lists(weights_of, min_size=1, max_size=9), st.integers(0, 400))
def test_every_stream_is_met_in_order_and_as_often_as_its_weight_says(weights, samples):
    turns, counts = InterleaveSchedule.of(weights), [0] * len(weights)
    for index in range(samples):
        stream, number = turns.at(index)
        assert number == counts[stream]
        counts[stream] += 1
    height = (len(weights) - 1).bit_length()
    for count, weight in zip(counts, weights):
        off = abs(count - weight / sum(weights) * samples)
        assert off <= Fraction(height, 2)
        assert off < 1 or len(weights) > 4


@given(st.lists(weights_of, min_size=2, max_size=5), st.integers(0, 10**15))
def test_what_was_asked_before_and_how_far_training_is_change_nothing(weights, index):
    """A stream's count far into training, found without a walk there, is still as its weight says."""
    stream, number = InterleaveSchedule.of(weights).at(index)
    assert abs(number - weights[stream] / sum(weights) * index) < 3


@given(st.lists(weights_of, min_size=1, max_size=5), st.integers(1, 50), st.integers(0, 1000))
def test_weights_of_any_sum_are_shares(weights, factor, index):
    assert InterleaveSchedule.of(weights).at(index) == InterleaveSchedule.of(
        [factor * weight for weight in weights]
    ).at(index)


def test_a_blend_gives_the_streams_samples_and_tells_its_shares(store_of):
    store = store_of([[1]])
    blend = Blend([Numbered(store, 0), Numbered(store, 1)], [Fraction(3), Fraction(1)])
    assert [blend.sample(index).tolist() for index in range(4)] == [[0, 0], [0, 1], [1, 0], [0, 2]]
    assert blend.in_words() == [
        "75.00% of the samples from stream 0",
        "25.00% of the samples from stream 1",
    ]


def test_streams_of_two_lengths_make_no_blend(store_of):
    store = store_of([[1]])
    with pytest.raises(AssertionError):
        Blend([Numbered(store, 0), Numbered(store, 1, seq_length=2)], [Fraction(1), Fraction(1)])
