"""Samples that are the beginnings of long documents, for evaluation by position.

Every position of such samples is preceded by the same documents' text, so a loss that falls with
the position shows that a model uses its context. In samples of joined or separated documents the
later positions belong to other documents than the earlier ones.
"""

from collections.abc import Sequence

import numpy as np

from megatron_ring.data.blend import Blend
from megatron_ring.data.samples import SampleStream
from megatron_ring.data.stream import SampleView, Stream, shuffled
from megatron_ring.data.tokens import TokenStore
from megatron_ring.data.whole_documents import WholeDocumentStream
from megatron_ring.errors import DataError


class LongDocumentStream(Stream):
    """The first S+1 tokens of each document that has as many, in shuffled order, without end.

    ``documents_of``: the stores, and the range of document numbers of each. ``count``: how many
    documents are long enough. Raises DataError if none is.
    """

    def __init__(
        self,
        documents_of: Sequence[tuple[TokenStore, range]],
        seq_length: int,
        seed: int,
        vocab_size: int,
    ):
        self.seq_length = seq_length
        self._vocab_size = vocab_size
        self._stores = [store for store, _ in documents_of]
        found = [
            (number, document)
            for number, (store, documents) in enumerate(documents_of)
            for document in documents.start
            + np.flatnonzero(store.lengths[documents.start : documents.stop] > seq_length)
        ]
        self.count = len(found)
        if not found:
            longest = max(
                int(store.lengths[documents.start : documents.stop].max(initial=0))
                for store, documents in documents_of
            )
            raise DataError(
                f"no document has the {seq_length + 1} tokens of a sample of {seq_length} (one "
                f"more is its last target): the longest has {longest}. Set --lengths to at most "
                f"{max(1, longest - 1)}, --part to another part, or --documents joined."
            )
        order = shuffled(len(found), seed, 0, "documents")
        self._found = [found[n] for n in order]

    @staticmethod
    def of(stream: Stream, seed: int) -> "LongDocumentStream":
        """Return the long documents among those of another stream, for its length."""
        streams = stream.streams if isinstance(stream, Blend) else [stream]
        assert all(isinstance(each, SampleStream | WholeDocumentStream) for each in streams)
        documents_of = [(each.store, each.documents) for each in streams]
        return LongDocumentStream(documents_of, stream.seq_length, seed, streams[0].vocab_size)

    def view(self, index: int) -> SampleView:
        """Return sample ``index``: see Stream."""
        store_number, document = self._found[index % self.count]
        store = self._stores[store_number]
        tokens = store.document(document)[: self.seq_length + 1]
        return SampleView([tokens], store, self._vocab_size)

    def describe(self) -> list[str]:
        """Return one line: the stores and how many documents are long enough."""
        prefixes = ", ".join(str(store.prefix) for store in self._stores)
        return [f"{prefixes}: {self.count:,} documents of more than {self.seq_length:,} tokens"]
