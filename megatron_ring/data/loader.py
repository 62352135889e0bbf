"""The pre-striping loader: each process is handed its own share of its own samples, already laid out.

The whole sample is cut here, once, by ``layout.positions``; nothing is moved between ranks afterwards. Targets are
shifted by one before the cut, so the target of a token lives where the token lives, although its neighbour may not.
This is selection only: no collectives, and the same samples in the same global batches for any grid.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.samples import SampleStream


@dataclass(frozen=True)
class Batch:
    """What one process feeds its model at once: ``B`` samples, and of each the ``l`` tokens that live here.

    ``tokens_Bl`` and ``targets_Bl`` are int64; the loss counts the targets that are not -100. ``positions_l`` is int64,
    the positions in the sample, the same for every sample and increasing.
    """

    tokens_Bl: torch.Tensor
    targets_Bl: torch.Tensor
    positions_l: torch.Tensor


class Loader:
    """The batches of one (data, ring) rank. ``consumed_samples`` is its whole state, and it holds for any grid.

    Sample ``consumed + micro * (micro_batch_size * data_size) + data_rank * micro_batch_size + b`` is row ``b`` of
    micro-batch ``micro`` on ``data_rank``. ``global_batch_size`` is in samples over all data ranks, a multiple of
    ``micro_batch_size * data_size``.
    """

    def __init__(
        self,
        stream: SampleStream,
        layout: Layout,
        ring_rank: int,
        data_rank: int,
        data_size: int,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ):
        assert layout.seq_length == stream.seq_length
        assert 0 <= data_rank < data_size
        assert global_batch_size % (micro_batch_size * data_size) == 0
        self._stream = stream
        self._positions_l = layout.positions(ring_rank)
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
        own, positions = range(first, first + self._micro_batch_size), self._positions_l.numpy()
        shards = [(sample[positions], sample[positions + 1]) for sample in map(self._stream.sample, own)]
        tokens_Bl, targets_Bl = (torch.from_numpy(np.stack(rows)) for rows in zip(*shards))
        return Batch(tokens_Bl, targets_Bl, self._positions_l)
