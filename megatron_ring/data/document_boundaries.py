"""Documents within a sample: how end-of-document tokens affect mask, positions and targets.

These are Megatron's three flags, independent of one another. An end-of-document token belongs to
the document it ends. Only the sample itself is considered: a document that began in an earlier
sample starts again at position 0. Boundaries are found in whole samples, one byte per token; ids,
positions and targets are computed only for the tokens that a process owns.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ring.config import DataConfig

IGNORE_INDEX = -100
"""The target of a token that is left out of the loss, equal to the ``ignore_index`` of PyTorch's
cross entropy. In a sample it marks the positions without text."""


@dataclass(frozen=True)
class DocumentBoundaries:
    """What the boundaries between documents change in a batch.

    ``ends_BS``, (B, S) bool, marks the end-of-document tokens of whole samples. Tokens and targets
    (B, l) may be those of any subset of a sample's tokens, and so may sample positions, (l,) for
    the same ones of all samples or (B, l).
    """

    end_of_document: int
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @staticmethod
    def from_config(config: DataConfig, end_of_document: int) -> "DocumentBoundaries":
        """Take the three flags from ``config``; documents end with the id ``end_of_document``."""
        return DocumentBoundaries(
            end_of_document,
            config.reset_attention_mask,
            config.reset_position_ids,
            config.eod_mask_loss,
        )

    @property
    def flags(self) -> list[str]:
        """Names of the flags that are on; any of them needs end-of-document tokens in the data."""
        return [name for name, value in vars(self).items() if value is True]

    @property
    def needs_whole_samples(self) -> bool:
        """Whether positions or starts depend on document ends that other ranks may own."""
        return self.reset_attention_mask or self.reset_position_ids

    def fill_padding(self, tokens_Bl: np.ndarray) -> np.ndarray:
        """Replace IGNORE_INDEX by end-of-document tokens: each padding token is a document."""
        return np.where(tokens_Bl == IGNORE_INDEX, self.end_of_document, tokens_Bl)

    def document_starts(self, ends_BS: np.ndarray) -> np.ndarray | None:
        """Return where each document begins, the samples laid end to end.

        (documents,) int64, increasing. None without reset_attention_mask: a token then attends to
        all earlier tokens of its sample.
        """
        return _starts(ends_BS) if self.reset_attention_mask else None

    def positions(self, ends_BS: np.ndarray, sample_positions: np.ndarray) -> np.ndarray:
        """Return the model's positions, int64, of the tokens at ``sample_positions``.

        (B, l), counted from the start of each document; ``sample_positions`` itself without
        reset_position_ids.
        """
        if not self.reset_position_ids:
            return sample_positions
        samples, seq_length = ends_BS.shape
        offsets_B1 = np.arange(samples)[:, None] * seq_length
        flat_positions_Bl = offsets_B1 + sample_positions
        starts = _starts(ends_BS)
        document_Bl = np.searchsorted(starts, flat_positions_Bl, side="right") - 1
        return flat_positions_Bl - starts[document_Bl]

    def targets(self, tokens_Bl: np.ndarray, next_Bl: np.ndarray) -> np.ndarray:
        """Return the target of each token: the next token ``next_Bl``.

        With eod_mask_loss the target of an end-of-document token is IGNORE_INDEX.
        """
        if not self.eod_mask_loss:
            return next_Bl
        return np.where(tokens_Bl == self.end_of_document, IGNORE_INDEX, next_Bl)


NO_BOUNDARIES = DocumentBoundaries(end_of_document=-1)
"""All three flags off: each sample is treated as one document. No token has the id -1."""


def _starts(ends_BS: np.ndarray) -> np.ndarray:
    starts_BS = np.ones_like(ends_BS)  # the first token of a sample always starts a document
    starts_BS[:, 1:] = ends_BS[:, :-1]
    return np.flatnonzero(starts_BS)
