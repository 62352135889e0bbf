"""Streams: what a loader reads from, samples numbered without end and equal on every process.

samples.py cuts samples from concatenated documents, whole_documents.py packs whole documents, and
blend.py interleaves such streams. A sample is a view into the memory-mapped token store: a rank
reads the positions it owns and no others.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError


@dataclass(frozen=True)
class SampleView:
    """One sample: consecutive ``pieces``, which are views into ``store``, from position 0 on."""

    pieces: list[np.ndarray]
    store: TokenStore
    vocab_size: int

    def tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at ``positions``, which must not decrease.

        (len(positions),) int64, IGNORE_INDEX after the last piece. Raises DataError for an id
        outside the vocabulary.
        """
        starts = self._piece_starts()
        bounds = np.searchsorted(positions, starts)
        tokens = np.full(len(positions), IGNORE_INDEX)
        for piece, start, first, stop in zip(self.pieces, starts, bounds, bounds[1:]):
            tokens[first:stop] = piece[positions[first:stop] - start]
        self._refuse_unknown_ids(tokens[: bounds[-1]], positions)
        return tokens

    def document_ends(self, end_of_document: int, seq_length: int) -> np.ndarray:
        """Mark the end-of-document tokens and the padding of the first ``seq_length`` positions.

        Returns (S,) bool.
        """
        ends = np.ones(seq_length, bool)
        start = 0
        for piece in self.pieces:
            piece_ends = piece[: seq_length - start] == end_of_document
            ends[start : start + len(piece_ends)] = piece_ends
            start += len(piece_ends)
        return ends

    def document_lengths(self, seq_length: int) -> np.ndarray:
        """Return the tokens of each document among the first ``seq_length``, as in the store.

        (documents,) int64. No token is read: a document is what the store's index says.
        """
        return np.diff(self._piece_starts().clip(max=seq_length))

    def _piece_starts(self) -> np.ndarray:
        """Return where each piece starts and where the last one ends: (pieces + 1,)."""
        return np.cumsum([0, *(len(piece) for piece in self.pieces)])

    def _refuse_unknown_ids(self, tokens: np.ndarray, positions: np.ndarray) -> None:
        unknown = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if unknown.size:
            first = unknown[0]
            prefix = self.store.prefix
            raise DataError(
                f"the tokenizer does not fit the data: token store {prefix} has id "
                f"{tokens[first]}, in {self._describe_location(positions[first])}, and the "
                f"tokenizer has {self.vocab_size} ids, 0 to {self.vocab_size - 1}. Set "
                "--tokenizer-model to the one the store was written with; if it is that one, the "
                f"file is damaged, and python tools/inspect_data.py {prefix} --verify lists all "
                "damage."
            )

    def _describe_location(self, position: int) -> str:
        starts = self._piece_starts()
        n = np.searchsorted(starts, position, side="right") - 1
        return self.store.where(self.pieces[n][position - starts[n] :])


class Stream(ABC):
    """Samples of ``seq_length`` S, found by number alone, so that a run resumes exactly."""

    seq_length: int

    @abstractmethod
    def view(self, index: int) -> SampleView:
        """Return sample ``index``, counted over all epochs.

        It holds up to S+1 tokens; those after the first are also targets.
        """

    @abstractmethod
    def describe(self) -> list[str]:
        """Return one line per token store: its prefix and the size of an epoch."""

    def sample(self, index: int) -> np.ndarray:
        """Return all of sample ``index``: (S+1,) int64.

        Tokens are [0, S), their targets [1, S+1); positions without text are IGNORE_INDEX.
        """
        return self.view(index).tokens_at(np.arange(self.seq_length + 1))


def shuffled(count: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """Return a permutation of ``range(count)``, (count,) int64, the same with any NumPy version.

    NumPy guarantees the raw bits of a generator across versions, but not ``Generator.shuffle``.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, *purpose.encode()]))
    return np.argsort(bits.random_raw(count), kind="stable")
