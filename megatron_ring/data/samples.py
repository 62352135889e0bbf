"""The running concatenation, ``--packing concatenate``: which tokens a sample of it holds.

The documents of a split are shuffled and joined, and the joined tokens are cut every ``seq_length``; each sample also
takes the first token of the next, its last target. The samples are then shuffled again, so that a long document is
not met in one go. Both orders follow from (seed, epoch) alone: every process computes them for itself, and a resumed
run meets what it would have met.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_ring.data.stream import Stream, Text, shuffled
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError

PARTS = ("training", "validation", "test")
"""What the shares of --split are for."""


def split_documents(lengths: np.ndarray, split: tuple[float, ...], seq_length: int) -> list[range]:
    """The documents for training, for validation and, of three shares, for the test: by number, in store order.

    ``lengths`` is (documents,), in tokens. A share of 0 gives an empty range. Raises DataError for every other part
    that cannot fill one sample.
    """
    parts = document_ranges(len(lengths), split)
    problems = [
        problem
        for name, share, part in zip(PARTS, split, parts)
        if share > 0 and (problem := _too_little(name, share, lengths, part, seq_length))
    ]
    if problems:
        raise DataError(problems)
    return parts


def document_ranges(documents: int, split: tuple[float, ...]) -> list[range]:
    """The documents of each share by number, each border rounded to the nearest document."""
    upto = np.cumsum(split)
    bounds = np.rint(upto / upto[-1] * documents).astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise([0, *bounds])]


def _too_little(name: str, share: float, lengths: np.ndarray, part: range, seq_length: int) -> str:
    tokens = int(lengths[part.start : part.stop].sum())
    if tokens > seq_length:
        return ""
    shorter = f"--seq-length to at most {tokens - 1}, " if tokens > 1 else ""
    return (
        f"{name}: a share of {share:g} of {len(lengths)} documents is {len(part)} documents with {tokens} tokens, and "
        f"one sample takes {seq_length + 1} (seq_length + 1). Set --split to give it more or none, {shorter}or prepare "
        "more text."
    )


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch: documents (D,) as they are joined, where each ends (D,) in tokens, samples (N,)."""

    number: int
    documents: np.ndarray
    ends: np.ndarray
    samples: np.ndarray


class SampleStream(Stream):
    """The endless stream of samples of one range of documents, epoch after epoch.

    Within an epoch the tokens are met once each, but for the last ones, fewer than ``seq_length``, that fill no sample.
    Keeps the order of one epoch in memory, O(documents + samples), and no tokens.
    """

    def __init__(
        self, store: TokenStore, documents: range, seq_length: int, seed: int, vocab_size: int
    ):
        self.store, self.documents = store, documents
        self.seq_length, self.seed, self.vocab_size = seq_length, seed, vocab_size
        tokens = int(store.lengths[documents.start : documents.stop].sum())
        self.samples_per_epoch = (tokens - 1) // seq_length
        assert self.samples_per_epoch > 0, "split_documents refuses such a range"
        self._epoch = self._ordered(0)

    def text(self, index: int) -> Text:
        """Sample ``index``: see Stream. Every place of it holds text."""
        number, n = divmod(index, self.samples_per_epoch)
        if number != self._epoch.number:
            self._epoch = self._ordered(number)
        start = int(self._epoch.samples[n]) * self.seq_length
        return Text(self._pieces(start, start + self.seq_length + 1), self.store, self.vocab_size)

    def in_words(self) -> list[str]:
        return [f"{self.store.prefix}: {self.samples_per_epoch:,} training samples an epoch"]

    def _ordered(self, number: int) -> _Epoch:
        documents = self.documents.start + shuffled(
            len(self.documents), self.seed, number, "documents"
        )
        samples = shuffled(self.samples_per_epoch, self.seed, number, "samples")
        return _Epoch(number, documents, np.cumsum(self.store.lengths[documents]), samples)

    def _pieces(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens [start, stop) of the epoch, document by document."""
        pieces = []
        at = int(np.searchsorted(self._epoch.ends, start, side="right"))
        while start < stop:
            document, end = self._epoch.documents[at], int(self._epoch.ends[at])
            begin = end - int(self.store.lengths[document])
            pieces.append(self.store.document(document)[start - begin : stop - begin])
            start, at = end, at + 1
        return pieces
