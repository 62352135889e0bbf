"""The pre-striping loader: each process is handed its own share of its own samples, already laid out.

A process reads the tokens that ``layout.positions`` gives it; nothing is moved between ranks afterwards. The target of
a token, the next one of the sample, is read where the token lives, although that neighbour may live elsewhere. Where
documents are kept apart their borders are looked for in the whole sample, for an end-of-document token may live
elsewhere than the document behind it. This is selection only: no collectives, and the same samples in the same global
batches for any grid.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.packing import IGNORED, NO_BORDERS, Packing
from megatron_ring.data.stream import Stream, Text


@dataclass(frozen=True)
class Batch:
    """What one process feeds its model at once: ``B`` samples, and of each the ``l`` tokens that live here.

    ``tokens_Bl`` and ``targets_Bl`` are int64; the loss counts the targets that are not -100. ``positions`` is int64,
    for the model: (l,), the positions in the sample, the same for every sample and increasing; (B, l) where they
    restart with each document. ``document_starts`` is int64 (documents,), increasing, on the CPU: where each document
    begins when the ``B`` whole samples are laid end to end, the same on every context rank. Sample ``b`` begins at
    ``b * S``, and a document with it. None: a token sees all of its sample that lies before it.
    """

    tokens_Bl: torch.Tensor
    targets_Bl: torch.Tensor
    positions: torch.Tensor
    document_starts: torch.Tensor | None

    def document_lengths(self, seq_length: int) -> torch.Tensor:
        """Tokens of each document, or of each sample where a sample is one: (documents,) int64."""
        samples = len(self.tokens_Bl)
        if self.document_starts is None:
            return torch.full((samples,), seq_length)
        return torch.cat([self.document_starts, torch.tensor([samples * seq_length])]).diff()


class Loader:
    """The batches of one process. ``consumed_samples`` is its whole state, and it holds for any grid.

    A ``layout`` longer than the stream's samples is filled up behind their end with tokens that change nothing.
    Sample ``consumed + micro * (micro_batch_size * data_size) + data_rank * micro_batch_size + b`` is row ``b`` of
    micro-batch ``micro`` on ``data_rank``. ``global_batch_size`` is in samples over all data ranks, a multiple of
    ``micro_batch_size * data_size``.
    """

    def __init__(
        self,
        stream: Stream,
        layout: Layout,
        ring_rank: int,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
        packing: Packing = NO_BORDERS,
        ulysses_rank: int = 0,
        ulysses_size: int = 1,
    ):
        assert layout.seq_length >= stream.seq_length
        assert 0 <= data_rank < data_size
        assert global_batch_size % (micro_batch_size * data_size) == 0
        self._stream = stream
        self._packing = packing
        self._fill, self._last = layout.seq_length - stream.seq_length, stream.seq_length - 1
        self._positions_l = layout.positions(ring_rank, ulysses_rank, ulysses_size).numpy()
        # Behind the end nobody looks: what fills a ragged layout repeats the last token, and predicts nothing.
        self._places_l, self._behind_l = (
            self._positions_l.clip(max=self._last),
            self._positions_l > self._last,
        )
        self._data_rank, self._data_size = data_rank, data_size
        self._micro_batch_size, self._global_batch_size = micro_batch_size, global_batch_size
        self._consumed_samples = consumed_samples

    @property
    def consumed_samples(self) -> int:
        """Samples that all data ranks together have taken: what a checkpoint keeps."""
        return self._consumed_samples

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next optimizer step. Raises DataError for an id outside the vocabulary."""
        across = self._micro_batch_size * self._data_size
        first = self._consumed_samples + self._data_rank * self._micro_batch_size
        batches = [
            self._batch(first + offset) for offset in range(0, self._global_batch_size, across)
        ]
        self._consumed_samples += self._global_batch_size
        return batches

    def _batch(self, first: int) -> Batch:
        texts = [self._stream.text(first + b) for b in range(self._micro_batch_size)]
        tokens_Bl = self._packing.filled(np.stack([text.at(self._places_l) for text in texts]))
        next_Bl = np.stack([text.at(self._places_l + 1) for text in texts])
        next_Bl[:, self._behind_l] = IGNORED
        positions, starts = self._borders(texts)
        return Batch(
            torch.from_numpy(tokens_Bl),
            torch.from_numpy(self._packing.targets(tokens_Bl, next_Bl)),
            torch.from_numpy(positions),
            None if starts is None else torch.from_numpy(starts),
        )

    def _borders(self, texts: list[Text]) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions here, and where documents start: for either the ends in all of a sample have to be looked at."""
        if not self._packing.looks_at_whole_samples:
            return self._places_l, None
        ends_BS = np.stack(
            [text.ends(self._packing.end_of_document, self._last + 1) for text in texts]
        )
        ends_BS = np.pad(ends_BS, ((0, 0), (0, self._fill)), mode="edge")
        positions = self._packing.positions(ends_BS, self._positions_l).clip(max=self._last)
        return positions, self._packing.document_starts(ends_BS)
