"""Documents within a sample: what its end-of-document tokens mean for the mask, the positions and the targets.

Megatron's three flags, independent of one another. An end-of-document token belongs to the document it ends. Only the
sample is looked at: a document that began in an earlier one begins again at position 0. All of it is said of whole
samples, which the loader cuts afterwards, and nothing here is larger than they are.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ring.config import DataConfig

IGNORED = -100
"""The target of a token that predicts nothing. Training leaves it out of the loss, and cannot be asked from here."""


@dataclass(frozen=True)
class Packing:
    """What becomes of the borders between documents. ``tokens_BS`` are the token ids of whole samples, (B, S)."""

    end_of_document: int
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @staticmethod
    def of(config: DataConfig, end_of_document: int) -> "Packing":
        """The three flags of ``config``, for a tokenizer whose documents end with that id."""
        return Packing(end_of_document, config.reset_attention_mask, config.reset_position_ids, config.eod_mask_loss)

    @property
    def flags(self) -> list[str]:
        """The names of the flags that are on: where any is, documents need their ends."""
        return [name for name, on in vars(self).items() if on is True]

    @property
    def looks_at_whole_samples(self) -> bool:
        """Whether positions or starts depend on the ends of documents, wherever those live."""
        return self.reset_attention_mask or self.reset_position_ids

    def filled(self, tokens_BS: np.ndarray) -> np.ndarray:
        """Any ``tokens_BS`` with an end-of-document token in every place without text, each a document of its own."""
        return np.where(tokens_BS == IGNORED, self.end_of_document, tokens_BS)

    def document_starts(self, tokens_BS: np.ndarray) -> np.ndarray | None:
        """Where each document begins, the samples laid end to end: (documents,) int64, increasing.

        None without reset_attention_mask: a token then sees all of its sample that lies before it.
        """
        return _starts(tokens_BS == self.end_of_document) if self.reset_attention_mask else None

    def positions(self, tokens_BS: np.ndarray) -> np.ndarray:
        """Positions for the model, int64: (B, S), from 0 in each document; (S,) without reset_position_ids."""
        if not self.reset_position_ids:
            return np.arange(tokens_BS.shape[1])
        starts = _starts(tokens_BS == self.end_of_document)
        lengths = np.diff(starts, append=tokens_BS.size)
        return (np.arange(tokens_BS.size) - np.repeat(starts, lengths)).reshape(tokens_BS.shape)

    def targets(self, tokens_BS: np.ndarray, next_BS: np.ndarray) -> np.ndarray:
        """What each token predicts: the one after it, ``next_BS``; IGNORED at a border under eod_mask_loss.

        Of any part of a sample, unlike the borders above.
        """
        return np.where(tokens_BS == self.end_of_document, IGNORED, next_BS) if self.eod_mask_loss else next_BS


NO_BORDERS = Packing(end_of_document=-1)
"""None of the three: a sample is taken as one document. No token has the id -1."""


def _starts(ends_BS: np.ndarray) -> np.ndarray:
    starts_BS = np.ones_like(ends_BS)  # each sample begins a document, whatever came before it
    starts_BS[:, 1:] = ends_BS[:, :-1]
    return np.flatnonzero(starts_BS)
