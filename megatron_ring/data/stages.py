"""Who reads what: a process's loader, by its place in the grid.

A context rank reads the tokens that live on it, and a pipeline stage behind the first reads nothing: what it needs of
a batch travels to it with the hidden states (model/pipeline.py), and the number of targets that count is handed on
(engine/pipeline_engine.py). Tensor ranks each read every token of their context rank: each looks all of them up in
its own rows of the embedding, and judges all of their targets by its own rows of the head.
"""

from dataclasses import dataclass

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.loader import Batch, Loader
from megatron_ring.data.packing import Packing
from megatron_ring.data.stream import Stream
from megatron_ring.parallel.grid import Coordinates, Grid


@dataclass
class LaterStageLoader:
    """The loader of a stage behind the first: it counts samples, for a checkpoint, and reads nothing."""

    global_batch_size: int
    consumed_samples: int

    def next_step(self) -> list[Batch]:
        """No micro-batches: those of the next optimizer step are the first stage's."""
        self.consumed_samples += self.global_batch_size
        return []


def loader_of(
    stream: Stream,
    packing: Packing,
    layout: Layout,
    grid: Grid,
    at: Coordinates,
    micro_batch_size: int,
    global_batch_size: int,
    consumed_samples: int,
) -> Loader | LaterStageLoader:
    """The loader of the process ``at``; sizes as in Loader."""
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
        packing,
        ulysses_rank=at.ulysses,
        ulysses_size=grid.ulysses,
    )
