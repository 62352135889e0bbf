"""Blends: samples of several streams taken in turns, each stream as often as its weight says.

Which stream sample ``i`` comes from, and which of that stream's it is, follows from ``i`` alone. The streams are the
leaves of a balanced binary tree. Of the first ``i`` samples that reach a node with shares p and 1 - p, round(p x i) go
left and the others right: so sample ``i`` goes left if round(p x (i + 1)) is one more than round(p x i), and is there
the sample of that number. Finding it takes a step for each level of the tree and no memory; a list of all samples,
which other stacks build, is not needed. Shares are fractions, so that no machine rounds differently.

How far a stream's count is from weight x i: rounding is off by at most 1/2 on each level, and what a node was off by
is shared out below it. So it is at most 1/2 for two streams, less than 1 for up to four, and for n streams less than
half the height of the tree, ceil(log2 n) / 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_ring.data.stream import Stream, Text


@dataclass(frozen=True)
class Turns:
    """Whose turn it is, for streams of these ``weights``: above 0, of any sum."""

    weights: tuple[Fraction, ...]

    def at(self, index: int) -> tuple[int, int]:
        """The stream that sample ``index`` of the blend comes from, and its number among that stream's samples."""
        first, stop = 0, len(self.weights)
        while stop - first > 1:
            middle = (first + stop) // 2
            share = Fraction(sum(self.weights[first:middle]), sum(self.weights[first:stop]))
            left = _rounded(share * index)
            if _rounded(share * (index + 1)) > left:
                stop, index = middle, left
            else:
                first, index = middle, index - left
        return first, index


class Blend(Stream):
    """Streams of one ``seq_length`` taken in turns; each goes through its own epochs."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[Fraction]):
        assert len({stream.seq_length for stream in streams}) == 1
        self.streams, self.seq_length = streams, streams[0].seq_length
        self._turns = Turns(tuple(weights))

    def text(self, index: int) -> Text:
        """Sample ``index``: see Stream."""
        stream, number = self._turns.at(index)
        return self.streams[stream].text(number)

    def in_words(self) -> list[str]:
        total = sum(self._turns.weights)
        return [
            f"{float(weight / total):.2%} of the samples from {line}"
            for weight, stream in zip(self._turns.weights, self.streams)
            for line in stream.in_words()
        ]


def _rounded(x: Fraction) -> int:
    """The nearest whole number, the upper one of two: never two more for a share of one more sample."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)
