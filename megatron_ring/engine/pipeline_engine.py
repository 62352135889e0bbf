"""DeepSpeed's pipeline engine: its module, built stage by stage, and one step at a time.

The schedule is DeepSpeed's 1F1B. Only the first stage reads micro-batches; what later stages need
of them travels with the hidden states (model/pipeline.py), except the number of counted targets,
which is broadcast before the step. The loss is a mean over micro-batches and data x context ranks,
as in the plain engine, so the same factor makes it the mean over tokens.
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
    """One pipeline stage of a GPT; all ranks call every method in the same order."""

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(_name_in_gpt(name), parameter) for name, parameter in super().named_parameters()]

    def _sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the first stage's sums on all ranks; blocks.

        One tensor rank of that stage broadcasts them to the ranks that process the same samples.
        """
        counts = super()._sum_counts(counts)
        dist.broadcast(counts, group=self.groups.model, group_src=0)
        return counts

    def _run_step(self, batches: list[Batch], factor: torch.Tensor) -> None:
        self.engine.train_batch(_micro_batches(batches, factor))

    def _step_loss_sum(self) -> torch.Tensor:
        """Return the last stage's loss; zero on the other stages, which do not compute it."""
        if self.engine.is_last_stage():
            # total_loss (DeepSpeed 0.19.8, runtime/pipe/engine.py): sum over micro-batches of what
            # loss_fn returned. If it changes, see _exec_forward_pass there.
            return self.engine.total_loss
        return torch.zeros((), device=self.device)

    def _global_loss_sum(self, batches: list[Batch]) -> torch.Tensor:
        # eval_batch averages over micro-batches and data x context ranks; the factor undoes that.
        factor = torch.tensor(float(self.averaged_over), device=self.device)
        return self.engine.eval_batch(_micro_batches(batches, factor)).squeeze()


def _micro_batches(
    batches: list[Batch], factor: torch.Tensor
) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Yield (inputs, label) of each micro-batch.

    DeepSpeed reads inputs on the first stage, which has batches, and labels on the last, which has
    none; the label is the factor of the loss.
    """
    if not batches:
        yield from repeat(((), factor))
    for batch in batches:
        starts = () if batch.document_starts is None else (batch.document_starts,)
        yield (batch.tokens_Bl, batch.targets_Bl, batch.positions, *starts), factor


def _name_in_gpt(name: str) -> str:
    """Return a parameter's name in a whole GPT.

    DeepSpeed's module prefixes names with the layer's number, or ``tied_modules`` for tied ones. An
    untied output matrix is a layer by itself, so its name there is just ``weight``.
    """
    name = re.sub(r"^(\d+|tied_modules)\.", "", name)
    return "output.weight" if name == "weight" else name
