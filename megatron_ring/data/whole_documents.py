"""Samples of whole documents (``--packing greedy``, ``best-fit`` and ``balanced``).

Unlike in the running concatenation of samples.py, a document that fits into a sample is not cut; a
longer one is cut every ``seq_length`` tokens. The positions left over at the end of a sample are
padding: the loader puts tokens there that have no target and that no text attends to.
bin_packing.py decides once which documents share a sample; epochs differ only in the order of the
samples. So the number of samples in an epoch is fixed, and any sample of any epoch is found without
reading those before it.
"""

import numpy as np

from megatron_ring.data.bin_packing import PACKERS
from megatron_ring.data.stream import SampleView, Stream, shuffled
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import counted


class WholeDocumentStream(Stream):
    """The endless stream of packs of one range of documents. ``fit`` is a name in PACKERS.

    Keeps where the pieces of documents lie and the order of one epoch, O(documents + samples), and
    no tokens.
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
        self.store = store
        self.documents = documents
        self.seq_length = seq_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.fit = fit
        order = documents.start + shuffled(len(documents), seed, 0, "documents")
        lengths = store.lengths[order]
        document_of_piece, self._begins = cut(lengths, seq_length)
        self._documents = order[document_of_piece]
        piece_lengths = np.minimum(lengths[document_of_piece] - self._begins, seq_length)
        self._packs = PACKERS[fit](piece_lengths, seq_length)
        self.samples_per_epoch = len(self._packs)
        assert self.samples_per_epoch > 0, "split_documents refuses such a range"
        self.padding_share = 1 - int(lengths.sum()) / (self.samples_per_epoch * seq_length)
        self._shuffle_epoch(0)

    def view(self, index: int) -> SampleView:
        """Return sample ``index``: see Stream.

        Its last token has a target only where the document continues in another sample.
        """
        epoch, n = divmod(index, self.samples_per_epoch)
        if epoch != self._epoch:
            self._shuffle_epoch(epoch)
        pieces = [self._piece(piece) for piece in self._packs[self._order[n]]]
        return SampleView(pieces, self.store, self.vocab_size)

    def describe(self) -> list[str]:
        """Return one line: the store, the samples in an epoch and the share of padding."""
        samples = counted(self.samples_per_epoch, "training sample", ",")
        return [
            f"{self.store.prefix}: {samples} an epoch of whole "
            f"documents ({self.fit}), {self.padding_share:.2%} padding"
        ]

    def _shuffle_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = shuffled(self.samples_per_epoch, self.seed, epoch, "samples")

    def _piece(self, piece: int) -> np.ndarray:
        """Return up to ``seq_length`` tokens of a document, plus the next as a target if any."""
        begin = self._begins[piece]
        return self.store.document(self._documents[piece])[begin : begin + self.seq_length + 1]


def cut(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents every ``seq_length`` tokens; ``lengths`` is (documents,).

    Return, for each piece, its document as an index into ``lengths`` and where in that document it
    begins: (pieces,) int64 both.
    """
    counts = -(-lengths // seq_length)
    document_of_piece = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    number_in_document = np.arange(len(document_of_piece)) - first_piece[document_of_piece]
    return document_of_piece, number_in_document * seq_length
