"""What a loader draws from: samples numbered without end, the same ones for every process that asks.

samples.py joins documents end to end, whole_documents.py fits whole ones together, mixture.py takes turns between such
streams. A sample is text that lies in the memory map: a rank reads the places it owns, and nothing else of it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from megatron_ring.data.packing import IGNORED
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError


@dataclass(frozen=True)
class Text:
    """One sample where it lies: ``pieces`` of ``store``, views of it, that follow one another from place 0 on."""

    pieces: list[np.ndarray]
    store: TokenStore
    vocab_size: int

    def at(self, places: np.ndarray) -> np.ndarray:
        """The tokens at ``places``, which do not decrease: (len(places),) int64, IGNORED behind the last piece.

        Raises DataError for an id among them that the vocabulary does not have.
        """
        starts = np.cumsum([0, *(len(piece) for piece in self.pieces)])
        bounds = np.searchsorted(places, starts)
        tokens = np.full(len(places), IGNORED)
        for piece, start, first, stop in zip(self.pieces, starts, bounds, bounds[1:]):
            tokens[first:stop] = piece[places[first:stop] - start]
        self._refuse_foreign(tokens[: bounds[-1]], places)
        return tokens

    def ends(self, end_of_document: int, seq_length: int) -> np.ndarray:
        """Where documents end in the first ``seq_length`` places, and wherever no text is: (S,) bool."""
        ends, start = np.ones(seq_length, bool), 0
        for piece in self.pieces:
            found = piece[: seq_length - start] == end_of_document
            ends[start : start + len(found)] = found
            start += len(found)
        return ends

    def _refuse_foreign(self, tokens: np.ndarray, places: np.ndarray) -> None:
        foreign = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if foreign.size:
            first, prefix = foreign[0], self.store.prefix
            raise DataError(
                f"the tokenizer does not fit the data: token store {prefix} has id {tokens[first]}, in "
                f"{self._where(places[first])}, and the tokenizer has {self.vocab_size} ids, 0 to "
                f"{self.vocab_size - 1}. Set --tokenizer-model to the one the store was written with; if it is, the "
                f"file is damaged, and python tools/inspect_data.py {prefix} --verify names what else is."
            )

    def _where(self, place: int) -> str:
        starts = np.cumsum([0, *(len(piece) for piece in self.pieces)])
        number = np.searchsorted(starts, place, side="right") - 1
        return self.store.where(self.pieces[number][place - starts[number] :])


class Stream(ABC):
    """Samples of ``seq_length`` tokens S, each known by its number alone, so that a resumed run goes on exactly."""

    seq_length: int

    @abstractmethod
    def text(self, index: int) -> Text:
        """Sample ``index``, counted over all epochs: up to S+1 tokens, of which those behind the first are targets."""

    @abstractmethod
    def in_words(self) -> list[str]:
        """A line for each token store: where it lies and what an epoch of it is."""

    def sample(self, index: int) -> np.ndarray:
        """All of sample ``index``: (S+1,) int64, tokens [0, S) and their targets [1, S+1), IGNORED where no text is."""
        return self.text(index).at(np.arange(self.seq_length + 1))


def shuffled(count: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """A permutation of ``range(count)``, (count,) int64, from the raw bits: NumPy promises those, unlike shuffle."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, *purpose.encode()]))
    return np.argsort(bits.random_raw(count), kind="stable")
