"""Samples of whole documents: ``--packing greedy`` and ``best-fit``, beside the running concatenation of samples.py.

No document is cut that fits into a sample; a longer one is cut every ``seq_length`` tokens. Places left over at the
end of a sample hold no text: the loader puts tokens there that predict nothing and that no text sees. Documents share
a sample with the same ones in every epoch, and only the order of the samples changes: so an epoch has a known number
of them, and any sample of any epoch is found at once.
"""

import numpy as np

from megatron_ring.data.bin_packing import FITS
from megatron_ring.data.stream import Stream, Text, shuffled
from megatron_ring.data.tokens import TokenStore


class WholeDocumentStream(Stream):
    """The endless stream of packs of one range of documents. ``fit`` is a name in FITS.

    Keeps where the pieces of documents lie and the order of one epoch, O(documents + samples), and no tokens.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: range,
        seq_length: int,
        seed: int,
        vocab_size: int,
        fit: str,
    ):
        self.store, self.seq_length, self.seed, self.vocab_size, self.fit = (
            store,
            seq_length,
            seed,
            vocab_size,
            fit,
        )
        order = documents.start + shuffled(len(documents), seed, 0, "documents")
        lengths = store.lengths[order]
        piece_of, self._begins = _cut(lengths, seq_length)
        self._documents = order[piece_of]
        self._packs = FITS[fit](
            np.minimum(lengths[piece_of] - self._begins, seq_length), seq_length
        )
        self.samples_per_epoch = len(self._packs)
        assert self.samples_per_epoch > 0, "split_documents refuses such a range"
        self.lost_share = 1 - int(lengths.sum()) / (self.samples_per_epoch * seq_length)
        self._ordered(0)

    def text(self, index: int) -> Text:
        """Sample ``index``: see Stream. It has a last target only where a document goes on in another sample."""
        epoch, n = divmod(index, self.samples_per_epoch)
        if epoch != self._epoch:
            self._ordered(epoch)
        return Text(
            [self._piece(piece) for piece in self._packs[self._order[n]]],
            self.store,
            self.vocab_size,
        )

    def in_words(self) -> list[str]:
        return [
            f"{self.store.prefix}: {self.samples_per_epoch:,} training samples an epoch of whole documents "
            f"({self.fit}), {self.lost_share:.2%} of their tokens lost to fill"
        ]

    def _ordered(self, epoch: int) -> None:
        self._epoch, self._order = (
            epoch,
            shuffled(self.samples_per_epoch, self.seed, epoch, "samples"),
        )

    def _piece(self, piece: int) -> np.ndarray:
        """Up to ``seq_length`` tokens of a document, and one more, a target, if it goes on behind them."""
        begin = self._begins[piece]
        return self.store.document(self._documents[piece])[begin : begin + self.seq_length + 1]


def _cut(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each piece the document, as an index into ``lengths``, and where in it the piece begins: (P,) int64 both."""
    counts = -(-lengths // seq_length)
    document_of = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    return document_of, (np.arange(len(document_of)) - first[document_of]) * seq_length
