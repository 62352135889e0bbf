"""What a loader draws from: samples numbered without end, the same ones for every process that asks.

samples.py joins documents end to end, whole_documents.py fits whole ones together, mixture.py takes turns between such
streams. Here is what they share: a random order, and the refusal of ids that the tokenizer does not have.
"""

from typing import Protocol

import numpy as np

from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError


class Stream(Protocol):
    """Samples of ``seq_length`` tokens S, each known by its number alone, so that a resumed run goes on exactly."""

    seq_length: int

    def sample(self, index: int) -> np.ndarray:
        """Sample ``index``, over all epochs: (S+1,) int64, tokens [0, S) and their targets [1, S+1).

        A place without text is IGNORED (packing.py); there are none but at the end. Raises DataError for an id that
        the vocabulary does not have.
        """

    def in_words(self) -> list[str]:
        """A line for each token store: where it lies and what an epoch of it is."""


def shuffled(count: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """A permutation of ``range(count)``, (count,) int64, from the raw bits: NumPy promises those, unlike shuffle."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, *purpose.encode()]))
    return np.argsort(bits.random_raw(count), kind="stable")


def refuse_foreign(tokens: np.ndarray, vocab_size: int, store: TokenStore) -> None:
    """Raises DataError for ids of ``store`` that a vocabulary of this size does not have."""
    foreign = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if foreign.size:
        raise DataError(
            f"the tokenizer does not fit the data: token store {store.prefix} has id {foreign[0]}, and the "
            f"tokenizer has {vocab_size} ids, 0 to {vocab_size - 1}. Set --tokenizer-model to the one "
            "the store was written with."
        )
