"""The pre-striping loader: each process is handed its own share of its own samples, already laid out.

The whole sample is cut here, once, by ``layout.positions``; nothing is moved between ranks afterwards. Targets are
shifted by one before the cut, so the target of a token lives where the token lives, although its neighbour may not;
documents are found before it too, for an end-of-document token may live elsewhere than the document behind it.
This is selection only: no collectives, and the same samples in the same global batches for any grid.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.packing import IGNORED, NO_BORDERS, Packing
from megatron_ring.data.stream import Stream


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
        self._fill = layout.seq_length - stream.seq_length
        self._positions_l = layout.positions(ring_rank, ulysses_rank, ulysses_size).numpy()
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
        batches = [self._batch(first + offset) for offset in range(0, self._global_batch_size, across)]
        self._consumed_samples += self._global_batch_size
        return batches

    def _batch(self, first: int) -> Batch:
        samples = np.stack([self._stream.sample(first + b) for b in range(self._micro_batch_size)])
        # Behind the end nobody looks: tokens that fill a ragged layout are seen by none and predict nothing.
        tokens_BS, next_BS = self._packing.filled(samples[:, :-1]), samples[:, 1:]
        if self._fill:
            tokens_BS = np.pad(tokens_BS, ((0, 0), (0, self._fill)), mode="edge")
            next_BS = np.pad(next_BS, ((0, 0), (0, self._fill)), constant_values=IGNORED)
        positions = self._packing.positions(tokens_BS).clip(max=self._stream.seq_length - 1)
        starts = self._packing.document_starts(tokens_BS)
        return Batch(
            self._cut(tokens_BS),
            self._cut(self._packing.targets(tokens_BS, next_BS)),
            self._cut(positions),
            None if starts is None else torch.from_numpy(starts),
        )

    def _cut(self, whole: np.ndarray) -> torch.Tensor:
        """This process's share of (..., S): (..., l)."""
        return torch.from_numpy(np.take(whole, self._positions_l, axis=-1))
