"""Optimizer steps of the real model and engine on random tokens, for benchmarks."""

import torch

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.data.loader import Batch
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.settings.run_settings import RunSettings


class Trainer:
    """A training run on this rank, started by all ranks together; needs DeepSpeed.

    ``document_starts`` are those of every micro-batch; None: each sample is one document.
    """

    def __init__(
        self,
        setup: RunSettings,
        rank: int,
        vocab_size: int,
        document_starts: torch.Tensor | None = None,
    ):
        # Imported here because processes that only start ranks do not need DeepSpeed.
        from megatron_ring.training.assembly import build_model, start_engine

        groups = ProcessGroups.build(setup.grid, rank)
        self.setup = setup
        self.vocab_size = vocab_size
        self.document_starts = document_starts
        self.coordinates = setup.grid.coordinates(rank)
        reduction = setup.config.parallel.context_parallel_reduction
        self.attention = ContextParallelAttention(
            setup.layout, setup.kernel.name, groups, reduction=reduction
        )
        model = build_model(setup, groups, self.attention, vocab_size)
        self.engine = start_engine(model, setup, groups)

    def step(self, layout: Layout | None = None) -> None:
        """Take one optimizer step on random tokens, in the layout of the run by default.

        Another layout may have fewer tokens.
        """
        layout = layout or self.setup.layout
        self.attention.layout = layout
        at = self.coordinates
        positions = layout.positions(at.ring, at.ulysses, self.setup.grid.ulysses)
        shape = (self.setup.config.training.micro_batch_size, len(positions) + 1)
        batches = []
        for _ in range(self.setup.micro_batches):
            ids = torch.randint(self.vocab_size, shape)
            tokens, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
            batches.append(Batch(tokens, targets, positions, self.document_starts))
        self.engine.train_step(batches, 1e-4)
