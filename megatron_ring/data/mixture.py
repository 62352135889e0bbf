"""Blends: samples of several streams taken in turns, each stream as often as its weight says.

Which stream sample ``i`` comes from, and which of that stream's it is, follows from ``i`` alone. The streams are the
leaves of a balanced binary tree. Of the first ``i`` samples that reach a node with shares p and 1 - p, round(p x i) go
left and the others right: so sample ``i`` goes left if round(p x (i + 1)) is one more than round(p x i), and is there
the sample of that number. Finding it takes a step for each level of the tree and no memory; a list of all samples,
which other stacks build, is not needed. Weights are whole numbers here, so that no machine rounds differently.

How far a stream's count is from weight x i: rounding is off by at most 1/2 on each level, and what a node was off by
is shared out below it. So it is at most 1/2 for two streams, less than 1 for up to four, and for n streams at most half
the height of the tree, ceil(log2 n) / 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

from megatron_ring.data.stream import Stream, Text


@dataclass(frozen=True)
class InterleaveSchedule:
    """Whose turn it is. ``edges`` (streams + 1,): the sum of the weights before each stream, in whole numbers."""

    edges: tuple[int, ...]

    @staticmethod
    def of(weights: Sequence[Fraction]) -> "InterleaveSchedule":
        """For streams of these weights, above 0 and of any sum."""
        unit = lcm(*(weight.denominator for weight in weights))
        return InterleaveSchedule(
            tuple(accumulate((int(weight * unit) for weight in weights), initial=0))
        )

    def at(self, index: int) -> tuple[int, int]:
        """The stream that sample ``index`` of the blend comes from, and its number among that stream's samples."""
        first, stop = 0, len(self.edges) - 1
        while stop - first > 1:
            middle = (first + stop) // 2
            part, whole = (
                self.edges[middle] - self.edges[first],
                self.edges[stop] - self.edges[first],
            )
            left = _rounded(part * index, whole)
            if _rounded(part * (index + 1), whole) > left:
                stop, index = middle, left
            else:
                first, index = middle, index - left
        return first, index


class Blend(Stream):
    """Streams of one ``seq_length`` taken in turns; each goes through its own epochs."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[Fraction]):
        assert len({stream.seq_length for stream in streams}) == 1
        self.streams, self.seq_length = streams, streams[0].seq_length
        self._weights, self._turns = weights, InterleaveSchedule.of(weights)

    def text(self, index: int) -> Text:
        """Sample ``index``: see Stream."""
        stream, number = self._turns.at(index)
        return self.streams[stream].text(number)

    def in_words(self) -> list[str]:
        total = sum(self._weights)
        return [
            f"{float(weight / total):.2%} of the samples from {line}"
            for weight, stream in zip(self._weights, self.streams)
            for line in stream.in_words()
        ]


def _rounded(dividend: int, divisor: int) -> int:
    """The whole number nearest to their quotient, the upper one of two."""
    return (2 * dividend + divisor) // (2 * divisor)
