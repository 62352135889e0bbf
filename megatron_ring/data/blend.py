"""Blends: interleave the samples of several streams in proportion to their weights.

Which stream sample ``i`` comes from, and which of that stream's samples it is, follows from ``i``
alone. The streams are the leaves of a balanced binary tree. Of the first ``i`` samples that reach a
node with shares p and 1 - p, round(p x i) go left and the others right: so sample ``i`` goes left
if round(p x (i + 1)) is one more than round(p x i), and becomes sample number round(p x i) of the
left subtree. A lookup takes one step per tree level and no memory; Megatron-LM and others build a
list of all samples instead. Weights are whole numbers here, so that no machine rounds differently.

How far a stream's count may be from weight x i: rounding is off by at most 1/2 on each level, and
an error at a node is divided among the streams below it. So it is at most 1/2 for two streams, less
than 1 for up to four, and for n streams at most half the height of the tree, ceil(log2 n) / 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

from megatron_ring.data.stream import SampleView, Stream


@dataclass(frozen=True)
class InterleaveSchedule:
    """The stream and sample number of each sample of a blend.

    ``edges`` (streams + 1,) are the cumulative weights as whole numbers, beginning with 0.
    """

    edges: tuple[int, ...]

    @staticmethod
    def of(weights: Sequence[Fraction]) -> "InterleaveSchedule":
        """Build the schedule for streams of these weights, each above 0, with any sum."""
        denominator = lcm(*(weight.denominator for weight in weights))
        whole_weights = (int(weight * denominator) for weight in weights)
        return InterleaveSchedule(tuple(accumulate(whole_weights, initial=0)))

    def at(self, index: int) -> tuple[int, int]:
        """Return the stream that sample ``index`` of the blend comes from, and its number there."""
        first = 0
        stop = len(self.edges) - 1
        while stop - first > 1:
            middle = (first + stop) // 2
            left_weight = self.edges[middle] - self.edges[first]
            weight = self.edges[stop] - self.edges[first]
            left = _round_half_up(left_weight * index, weight)
            if _round_half_up(left_weight * (index + 1), weight) > left:
                stop = middle
                index = left
            else:
                first = middle
                index -= left
        return first, index


class Blend(Stream):
    """Streams of one ``seq_length``, interleaved; each goes through its own epochs."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[Fraction]):
        assert len({stream.seq_length for stream in streams}) == 1
        self.streams = streams
        self.seq_length = streams[0].seq_length
        self._weights = weights
        self._schedule = InterleaveSchedule.of(weights)

    def view(self, index: int) -> SampleView:
        """Return sample ``index``: see Stream."""
        stream, number = self._schedule.at(index)
        return self.streams[stream].view(number)

    def describe(self) -> list[str]:
        """Return the lines of the streams, each with its share of the samples."""
        total = sum(self._weights)
        return [
            f"{float(weight / total):.2%} of the samples from {line}"
            for weight, stream in zip(self._weights, self.streams)
            for line in stream.describe()
        ]


def _round_half_up(dividend: int, divisor: int) -> int:
    """Return the whole number nearest to the quotient, rounding halves up."""
    return (2 * dividend + divisor) // (2 * divisor)
