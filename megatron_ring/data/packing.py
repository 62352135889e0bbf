"""Documents within a sample: what its end-of-document tokens mean for the mask, the positions and the targets.

Megatron's three flags, independent of one another. An end-of-document token belongs to the document it ends. Only the
sample is looked at: a document that began in an earlier one begins again at position 0. Borders are looked for in whole
samples, a byte for each token; ids, positions and targets are those of the tokens that a process owns.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ring.config import DataConfig

IGNORED = -100
"""The target of a token that predicts nothing. Training leaves it out of the loss, and cannot be asked from here."""


@dataclass(frozen=True)
class Packing:
    """What becomes of the borders between documents. ``ends_BS`` tells where they end in whole samples, (B, S) bool.

    Tokens and targets (B, l), and the places (l,) they have in their samples, may be of any part of them.
    """

    end_of_document: int
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @staticmethod
    def of(config: DataConfig, end_of_document: int) -> "Packing":
        """The three flags of ``config``, for a tokenizer whose documents end with that id."""
        return Packing(
            end_of_document,
            config.reset_attention_mask,
            config.reset_position_ids,
            config.eod_mask_loss,
        )

    @property
    def flags(self) -> list[str]:
        """The names of the flags that are on: where any is, documents need their ends."""
        return [name for name, on in vars(self).items() if on is True]

    @property
    def looks_at_whole_samples(self) -> bool:
        """Whether positions or starts depend on the ends of documents, wherever those live."""
        return self.reset_attention_mask or self.reset_position_ids

    def filled(self, tokens_Bl: np.ndarray) -> np.ndarray:
        """``tokens_Bl`` with an end-of-document token in every place without text, each a document of its own."""
        return np.where(tokens_Bl == IGNORED, self.end_of_document, tokens_Bl)

    def document_starts(self, ends_BS: np.ndarray) -> np.ndarray | None:
        """Where each document begins, the samples laid end to end: (documents,) int64, increasing.

        None without reset_attention_mask: a token then sees all of its sample that lies before it.
        """
        return _starts(ends_BS) if self.reset_attention_mask else None

    def positions(self, ends_BS: np.ndarray, places_l: np.ndarray) -> np.ndarray:
        """Positions for the model, int64, of the tokens at ``places_l`` of every sample.

        (B, l), from 0 in each document; ``places_l`` themselves without reset_position_ids.
        """
        if not self.reset_position_ids:
            return places_l
        samples, seq_length = ends_BS.shape
        places_Bl = np.arange(samples)[:, None] * seq_length + places_l
        starts = _starts(ends_BS)
        return places_Bl - starts[np.searchsorted(starts, places_Bl, side="right") - 1]

    def targets(self, tokens_Bl: np.ndarray, next_Bl: np.ndarray) -> np.ndarray:
        """What each token predicts: the token after it, ``next_Bl``; IGNORED at a border under eod_mask_loss."""
        return (
            np.where(tokens_Bl == self.end_of_document, IGNORED, next_Bl)
            if self.eod_mask_loss
            else next_Bl
        )


NO_BORDERS = Packing(end_of_document=-1)
"""None of the three: a sample is taken as one document. No token has the id -1."""


def _starts(ends_BS: np.ndarray) -> np.ndarray:
    starts_BS = np.ones_like(ends_BS)  # each sample begins a document, whatever came before it
    starts_BS[:, 1:] = ends_BS[:, :-1]
    return np.flatnonzero(starts_BS)
