"""The pre-striping loader: a process reads only its own tokens of its own samples.

From samples to a rank's share of a micro-batch:

- The samples of a global batch are divided over the data ranks and, on each, into micro-batches of
  ``micro_batch_size`` (see ``Loader`` for the formula), or assigned to the same slots by their work
  (sample_assignment.py).
- Of each sample a context rank reads the tokens at ``layout.positions`` for its ring and Ulysses
  rank, or where the sample's documents are placed by size, at positions of its own
  (context_parallel/placement.py). So nothing has to be redistributed between ranks afterwards. The
  target of a token is the
  next token of the sample, which is read here too although it may belong to another rank.
- Where document boundaries matter, they are found in the whole sample, because the
  end-of-document token before a document may belong to another rank (document_boundaries.py).
- Every tensor rank reads all tokens of its context rank: it looks all of them up in its own rows of
  the embedding and scores all of their targets with its own rows of the head.
- A pipeline stage after the first reads nothing: engine/pipeline_engine.py passes on what it needs
  of a batch with the hidden states, and broadcasts the number of targets in the loss.

This is selection only: no collectives, and the same samples in the same global batches on any grid.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.placement import place_samples, placed_positions
from megatron_ring.data import sample_assignment
from megatron_ring.data.document_boundaries import IGNORE_INDEX, NO_BOUNDARIES, DocumentBoundaries
from megatron_ring.data.sample_assignment import DataImbalance
from megatron_ring.data.stream import SampleView, Stream
from megatron_ring.parallel.grid import Coordinates, Grid


@dataclass(frozen=True)
class Batch:
    """One micro-batch as one process feeds it to the model: ``B`` samples, ``l`` tokens of each.

    - ``tokens_Bl``, ``targets_Bl``: int64. Targets of -100 are left out of the loss.
    - ``positions``: int64, for the model. (l,) positions in the sample, increasing and the same for
      every sample; (B, l) where they restart with each document, or where samples are placed.
    - ``document_starts``: int64 (documents,), increasing, on the CPU: where each document begins
      when the ``B`` whole samples are laid end to end. Sample ``b`` begins at ``b * S``, and a
      document begins with it. The same on every context rank. None: a token attends to all earlier
      tokens of its sample.
    - ``data_imbalance``: of the step over the data ranks; None where all have the same work.
    """

    tokens_Bl: torch.Tensor
    targets_Bl: torch.Tensor
    positions: torch.Tensor
    document_starts: torch.Tensor | None
    data_imbalance: DataImbalance | None = None

    def document_lengths(self, seq_length: int) -> torch.Tensor:
        """Return the tokens of each document, (documents,) int64.

        Without ``document_starts`` each sample is one document.
        """
        samples = len(self.tokens_Bl)
        if self.document_starts is None:
            return torch.full((samples,), seq_length)
        return torch.cat([self.document_starts, torch.tensor([samples * seq_length])]).diff()


class Loader:
    """The batches of one process. ``consumed_samples`` is its whole state and is valid on any grid.

    Row ``b`` of micro-batch ``micro`` on ``data_rank`` is sample
    ``consumed + micro * (micro_batch_size * data_size) + data_rank * micro_batch_size + b``. With
    ``assigns_by_work`` it is that sample of the step which ``sample_assignment.by_work`` puts
    there, for layers with a ``window``.
    ``global_batch_size`` is in samples over all data ranks, a multiple of
    ``micro_batch_size * data_size``. A ``layout`` longer than the stream's samples is padded at the
    end with tokens that do not change the loss.
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
        boundaries: DocumentBoundaries = NO_BOUNDARIES,
        ulysses_rank: int = 0,
        ulysses_size: int = 1,
        assigns_by_work: bool = False,
        window: int = 0,
    ):
        assert layout.seq_length >= stream.seq_length
        assert 0 <= data_rank < data_size
        assert global_batch_size % (micro_batch_size * data_size) == 0
        self._stream = stream
        self._boundaries = boundaries
        self._layout_padding = layout.seq_length - stream.seq_length
        self._last = stream.seq_length - 1
        self._layout = layout
        self._process = ring_rank, ulysses_rank, ulysses_size
        self._layout_positions_l = layout.positions(*self._process).numpy()
        self._data_rank = data_rank
        self._data_size = data_size
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._consumed_samples = consumed_samples
        self._assigns_by_work = assigns_by_work
        self._window = window

    @property
    def consumed_samples(self) -> int:
        """Samples consumed by all data ranks together, as a checkpoint stores it."""
        return self._consumed_samples

    def next_step(self) -> list[Batch]:
        """Return the micro-batches of the next optimizer step.

        Raises DataError for a token id outside the vocabulary.
        """
        first = self._consumed_samples

        @functools.cache  # an earlier view may be of another epoch, whose order is computed again
        def view(sample: int) -> SampleView:
            return self._stream.view(first + sample)

        slots_G, imbalance = self._assign(view)
        slots_MDB = slots_G.reshape(-1, self._data_size, self._micro_batch_size)
        batches = [
            self._batch([view(sample) for sample in samples_B], imbalance)
            for samples_B in slots_MDB[:, self._data_rank].tolist()
        ]
        self._consumed_samples += self._global_batch_size
        return batches

    def _assign(self, view: Callable[[int], SampleView]) -> tuple[np.ndarray, DataImbalance | None]:
        """Return which sample of the step is in each slot, (G,), and the imbalance."""
        samples = self._global_batch_size
        slots_G = sample_assignment.in_order(samples)
        imbalance = None
        if self._data_size > 1 and self._boundaries.reset_attention_mask:
            sizes = self._data_size, self._micro_batch_size
            work_G = np.array([self._work(view(sample)) for sample in range(samples)])
            as_they_come = sample_assignment.imbalance(work_G, slots_G, *sizes)
            if self._assigns_by_work:
                slots_G = sample_assignment.by_work(work_G, *sizes)
            assigned = sample_assignment.imbalance(work_G, slots_G, *sizes)
            imbalance = DataImbalance(assigned, as_they_come)
        return slots_G, imbalance

    def _work(self, view: SampleView) -> int:
        lengths = view.document_lengths(self._stream.seq_length)
        return sample_assignment.visible_pairs(lengths, self._window)

    def _batch(self, views: list[SampleView], imbalance: DataImbalance | None) -> Batch:
        # Before tokens are read: here memory of whole samples is needed.
        positions, layout_positions, starts = self._positions_and_starts(views)
        layout_positions_Bl = np.broadcast_to(
            layout_positions, (len(views), layout_positions.shape[-1])
        )
        # Padding of a ragged layout repeats the last token and has no target; it comes after all
        # text, so under the causal mask no text attends to it.
        at_Bl = layout_positions_Bl.clip(max=self._last)
        tokens_Bl = np.stack([view.tokens_at(at_l) for view, at_l in zip(views, at_Bl)])
        tokens_Bl = self._boundaries.fill_padding(tokens_Bl)
        next_Bl = np.stack([view.tokens_at(at_l + 1) for view, at_l in zip(views, at_Bl)])
        next_Bl[layout_positions_Bl > self._last] = IGNORE_INDEX
        targets_Bl = self._boundaries.targets(tokens_Bl, next_Bl)
        return Batch(
            torch.from_numpy(tokens_Bl),
            torch.from_numpy(targets_Bl),
            torch.from_numpy(positions),
            starts,
            imbalance,
        )

    def _positions_and_starts(
        self, views: list[SampleView]
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor | None]:
        """Return the model's positions and those of the layout, and document starts.

        Both positions are those of this rank's tokens: (l,), the same for all samples, or (B, l).
        Starts are those of whole samples. The model's positions and the starts depend on the
        document ends of the whole sample, which are searched only where one of them is needed.
        """
        layout_positions = self._layout_positions_l
        if not self._boundaries.needs_whole_samples:
            return layout_positions.clip(max=self._last), layout_positions, None
        end_of_document = self._boundaries.end_of_document
        ends_BS = np.stack([view.document_ends(end_of_document, self._last + 1) for view in views])
        ends_BS = np.pad(ends_BS, ((0, 0), (0, self._layout_padding)), mode="edge")
        starts = None
        if (found := self._boundaries.document_starts(ends_BS)) is not None:
            starts = torch.from_numpy(found)
            if placements := place_samples(starts, len(views), self._layout):
                placed_Bl = placed_positions(self._layout, placements, *self._process)
                layout_positions = placed_Bl.numpy()
        positions = self._boundaries.positions(ends_BS, layout_positions)
        return positions.clip(max=self._last), layout_positions, starts


@dataclass
class LaterStageLoader:
    """The loader of a pipeline stage after the first: counts samples and reads nothing."""

    global_batch_size: int
    consumed_samples: int

    def next_step(self) -> list[Batch]:
        """Count one optimizer step and return no micro-batches: only the first stage has them."""
        self.consumed_samples += self.global_batch_size
        return []


def build_loader(
    stream: Stream,
    boundaries: DocumentBoundaries,
    layout: Layout,
    grid: Grid,
    at: Coordinates,
    micro_batch_size: int,
    global_batch_size: int,
    consumed_samples: int,
    assigns_by_work: bool = False,
    window: int = 0,
) -> Loader | LaterStageLoader:
    """Build the loader of the process at coordinates ``at`` of ``grid``; the rest as in Loader."""
    if at.pipe > 0:
        return LaterStageLoader(global_batch_size, consumed_samples)
    return Loader(
        stream,
        layout,
        at.ring,
        at.data,
        grid.data,
        micro_batch_size,
        global_batch_size,
        consumed_samples,
        boundaries,
        ulysses_rank=at.ulysses,
        ulysses_size=grid.ulysses,
        assigns_by_work=assigns_by_work,
        window=window,
    )
