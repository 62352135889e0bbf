"""The pipeline under DeepSpeed: its module, built stage by stage, and its engine, driven one optimizer step at a time.

The schedule is DeepSpeed's 1F1B. The first stage reads the micro-batches and later ones are given none: what they need
of them travels (model/pipeline.py), but for the number of targets that count, which is handed on before. The loss is a
mean over micro-batches and D x C, as the plain engine's, so the same scale makes it the token mean.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from itertools import repeat

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatron_ring.config import ModelConfig
from megatron_ring.data.loader import Batch
from megatron_ring.engine.engine import Engine
from megatron_ring.model import pipeline
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.execution import Execution
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.stages import layers_of_stage


def pipelined(
    grid: Grid,
    packed: bool,
    config: ModelConfig,
    vocab_size: int,
    seq_length: int,
    attention: AttentionFunction,
    seed: int,
    execution: Execution,
) -> PipelineModule:
    """This process's stage of a GPT. ``packed``: document borders travel, of which every parcel has another number."""
    vocabulary = config, vocab_size, seed, execution
    stages = (layers_of_stage(config.num_layers, grid.pipe, stage) for stage in range(grid.pipe))
    # A checkpoint holds layers that are modules. One with a forward_fn is a function: the tied copy, copied on loading.
    layers = [
        TiedLayerSpec("embedding", pipeline.StageEmbedding, "embedding", *vocabulary),
        *(
            LayerSpec(pipeline.StageLayers, config, seq_length, attention, seed, execution, run)
            for run in stages
        ),
        LayerSpec(pipeline.StageOutput, "output", *vocabulary)
        if config.untie_embeddings_and_output_weights
        else TiedLayerSpec(
            "embedding", pipeline.StageEmbedding, "embedding", *vocabulary, forward_fn=pipeline.head
        ),
    ]
    # It prints its layers, and copies the tied weights to the last stage in sight of autograd.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), torch.no_grad():
        return PipelineModule(
            layers,
            topology=PipeModelDataParallelTopology(
                num_pp=grid.pipe, num_mp=grid.tensor, num_dp=grid.data_context
            ),
            loss_fn=torch.mul,  # a loss sum by the scale that comes as its label
            partition_method="type:StageLayers",
            dynamic_shape=packed,
        )


class PipelineEngine(Engine):
    """A stage of a GPT, in step with the others."""

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(_name_in_gpt(name), parameter) for name, parameter in super().named_parameters()]

    def _sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Those of the first stage, on all: one tensor rank of it hands them on to all that share its samples."""
        counts = super()._sum(counts)
        dist.broadcast(counts, group=self.groups.model, group_src=0)
        return counts

    def _step(self, batches: list[Batch], scale: torch.Tensor) -> None:
        self.engine.train_batch(_loaded(batches, scale))

    def _loss_of_shares(self) -> torch.Tensor:
        """Of the last stage, which alone knows them."""
        return (
            self.engine.total_loss
            if self.engine.is_last_stage()
            else torch.zeros((), device=self.device)
        )

    def _evaluated(self, batches: list[Batch]) -> torch.Tensor:
        scale = torch.tensor(float(self.averaged_over), device=self.device)
        return self.engine.eval_batch(_loaded(batches, scale)).squeeze()


def _loaded(batches: list[Batch], scale: torch.Tensor) -> Iterator[tuple[tuple, torch.Tensor]]:
    """(inputs, label) of each micro-batch: the first stage, which has batches, takes the one, the last the other."""
    if not batches:
        yield from repeat(((), scale))
    for batch in batches:
        starts = () if batch.document_starts is None else (batch.document_starts,)
        yield (batch.tokens_Bl, batch.targets_Bl, batch.positions, *starts), scale


def _name_in_gpt(name: str) -> str:
    """DeepSpeed's module numbers its layers, but for tied ones; an output's matrix of its own is a layer by itself."""
    name = re.sub(r"^(\d+|tied_modules)\.", "", name)
    return "output.weight" if name == "weight" else name
