"""Samples from the running concatenation of documents (``--packing concatenate``).

The documents of one part of the split are shuffled and joined, and the joined tokens are cut every
``seq_length``: sample n holds tokens [n S, (n+1) S], where the last one is also the first token of
the next sample and serves as a target only. The samples are then shuffled again, which spreads the
samples of a long document over the epoch. Both orders follow from (seed, epoch) alone: every
process computes them for itself, and a resumed run continues exactly where it stopped.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_ring.data.stream import SampleView, Stream, shuffled
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError, counted

PARTS = ("training", "validation", "test")
"""The parts of the data, in the order of the shares of --split."""


def split_documents(
    lengths: np.ndarray,
    split: tuple[float, ...],
    seq_length: int,
    needed: Collection[str] = PARTS,
) -> list[range]:
    """Return the document numbers of each part: training, validation and, of three shares, test.

    Parts are contiguous in store order. ``lengths`` is (documents,), in tokens. A share of 0 gives
    an empty range, and so does a part that is not ``needed``. Raises DataError for every other part
    that cannot fill one sample.
    """
    ranges = document_ranges(len(lengths), split)
    parts = [part if name in needed else range(0) for name, part in zip(PARTS, ranges)]
    problems = [
        problem
        for name, share, part in zip(PARTS, split, parts)
        if share > 0
        and name in needed
        and (problem := _too_small(name, share, lengths, part, seq_length))
    ]
    if problems:
        raise DataError(problems)
    return parts


def document_ranges(documents: int, split: tuple[float, ...]) -> list[range]:
    """Return the document numbers of each share, boundaries rounded to the nearest document."""
    cumulative = np.cumsum(split)
    bounds = np.rint(cumulative / cumulative[-1] * documents).astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise([0, *bounds])]


def _too_small(name: str, share: float, lengths: np.ndarray, part: range, seq_length: int) -> str:
    """Describe a part with too few tokens for one sample, "" for one with enough."""
    tokens = int(lengths[part.start : part.stop].sum())
    if tokens > seq_length:
        return ""
    shorter = f"--seq-length to at most {tokens - 1}, " if tokens > 1 else ""
    return (
        f"{name}: a share of {share:g} of {counted(len(lengths), 'document')} is "
        f"{counted(len(part), 'document')} with {counted(tokens, 'token')}, and one sample takes "
        f"{seq_length + 1} (seq_length + 1). Set --split to give it more or none, {shorter}or "
        "prepare more text."
    )


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch.

    ``documents`` (documents,): document numbers in the order they are joined; ``ends``
    (documents,): where each ends, in tokens; ``samples`` (samples,): the shuffled sample numbers.
    """

    number: int
    documents: np.ndarray
    ends: np.ndarray
    samples: np.ndarray


class SampleStream(Stream):
    """The endless stream of samples cut from one range of documents, epoch after epoch.

    An epoch holds each token once, except that the last few, fewer than ``seq_length``, do not fill
    a sample and are dropped. Keeps the order of one epoch in memory, O(documents + samples), and no
    tokens.
    """

    def __init__(
        self, store: TokenStore, documents: range, seq_length: int, seed: int, vocab_size: int
    ):
        self.store = store
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        tokens = int(store.lengths[documents.start : documents.stop].sum())
        self.samples_per_epoch = (tokens - 1) // seq_length
        assert self.samples_per_epoch > 0, "split_documents refuses such a range"
        self._epoch = self._shuffled_epoch(0)

    def view(self, index: int) -> SampleView:
        """Return sample ``index``: see Stream. It holds S+1 tokens of text, without padding."""
        epoch, n = divmod(index, self.samples_per_epoch)
        if epoch != self._epoch.number:
            self._epoch = self._shuffled_epoch(epoch)
        start = int(self._epoch.samples[n]) * self.seq_length
        pieces = self._pieces(start, start + self.seq_length + 1)
        return SampleView(pieces, self.store, self.vocab_size)

    def describe(self) -> list[str]:
        """Return one line: the store and the samples in an epoch."""
        samples = counted(self.samples_per_epoch, "training sample", ",")
        return [f"{self.store.prefix}: {samples} an epoch"]

    def _shuffled_epoch(self, number: int) -> _Epoch:
        order = shuffled(len(self.documents), self.seed, number, "documents")
        documents = self.documents.start + order
        samples = shuffled(self.samples_per_epoch, self.seed, number, "samples")
        return _Epoch(number, documents, np.cumsum(self.store.lengths[documents]), samples)

    def _pieces(self, start: int, stop: int) -> list[np.ndarray]:
        """Return tokens [start, stop) of the epoch's concatenation, one view per document."""
        pieces = []
        n = int(np.searchsorted(self._epoch.ends, start, side="right"))
        while start < stop:
            document = self._epoch.documents[n]
            end = int(self._epoch.ends[n])
            begin = end - int(self.store.lengths[document])
            pieces.append(self.store.document(document)[start - begin : stop - begin])
            start = end
            n += 1
        return pieces
