"""Pipeline parallelism under DeepSpeed: the modules of a stage and the engine that trains them.

    (tokens, targets, positions, ...) -> StageEmbedding -> StageLayers of each stage -> head -> loss

Stages pass on a tuple of tensors: the residual stream, its tokens' targets and positions and,
where documents are kept apart, the documents' first indices, so that every stage applies positions
and masks of the micro-batch that it computes, and the last stage its targets. Only the stream has a
gradient.

The schedule is DeepSpeed's 1F1B (Narayanan et al. 2019, PipeDream). Only the first stage reads
micro-batches; later ones receive all they need from the stage before, except for the number of
counted targets, which is broadcast first. The loss is a mean over micro-batches and data x context
ranks, as in the plain engine, so the same factor makes it the mean over tokens.
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

from megatron_ring.data.loader import Batch
from megatron_ring.engine.engine import Engine
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.gpt import Layers, Vocabulary, loss_sum
from megatron_ring.model.initialization import build
from megatron_ring.parallel.grid import layers_of_stage
from megatron_ring.parallel.tensor_exchange import TensorParallel
from megatron_ring.settings.run_settings import RunSettings

StageTensors = tuple[torch.Tensor, ...]
"""What a stage passes to the next: (x_BmE, targets_Bl, positions), or with document_starts."""


class StageEmbedding(Vocabulary):
    """The first module of the first stage."""

    def forward(self, tensors: StageTensors) -> StageTensors:
        """Embed ``tensors``, which have int64 tokens_Bl in the place of x_BmE."""
        tokens_Bl, *rest = tensors
        return super().forward(tokens_Bl), *rest


class StageLayers(Layers):
    """The layers of one stage."""

    def forward(self, tensors: StageTensors) -> StageTensors:
        x_BmE, targets_Bl, positions_l, *starts = tensors
        # The mask is made on the host, but stages receive tensors on the device.
        document_starts = starts[0].cpu() if starts else None
        x_BmE = self.run(x_BmE, positions_l, document_starts)
        return x_BmE, targets_Bl, positions_l, *starts


class StageOutput(Vocabulary):
    """The last module of the last stage, where the head has weights of its own."""

    def forward(self, tensors: StageTensors) -> torch.Tensor:
        return head(self, tensors)


def head(vocabulary: Vocabulary, tensors: StageTensors) -> torch.Tensor:
    """Return the loss sum of a micro-batch; ``vocabulary`` is the embedding's copy when tied.

    The loss is no loss function of DeepSpeed's: that would be outside the module, and the weight
    gradient it adds is cleared in bfloat16 without ZeRO when the module's own backward begins.
    """
    x_BmE, targets_Bl, *_ = tensors
    return loss_sum(
        x_BmE,
        vocabulary.weight,
        targets_Bl,
        vocabulary.tensor,
        vocabulary.operations,
        vocabulary.memory,
    )


class _Initialized:
    """A layer specification whose module is built on the meta device and then initialized."""

    def build(self, log: bool = False) -> torch.nn.Module:
        return build(self.typename, *self.module_args, **self.module_kwargs)


class _InitializedLayer(_Initialized, LayerSpec):
    pass


class _InitializedTiedLayer(_Initialized, TiedLayerSpec):
    pass


def build_stage(
    setup: RunSettings, attention: AttentionFunction, vocab_size: int, tensor: TensorParallel
) -> PipelineModule:
    """Build and initialize this process's stage of a GPT. Collective over all processes."""
    config = setup.config
    model = config.model
    stages = setup.grid.pipe
    options = {
        "tensor": tensor,
        "operations": setup.operations.operations,
        "memory": config.memory,
        "seed": config.training.seed,
        "device": setup.device,
        "dtype": setup.precision.dtype,
    }
    # A DeepSpeed checkpoint holds layers that are modules. A layer with a forward_fn is a function:
    # the tied copy, which is copied when a checkpoint is loaded.
    embedding = _InitializedTiedLayer(
        "embedding", StageEmbedding, model, vocab_size, prefix="embedding", **options
    )
    layers = [
        _InitializedLayer(
            StageLayers,
            model,
            config.data.seq_length,
            attention,
            layers=layers_of_stage(model.num_layers, stages, stage),
            **options,
        )
        for stage in range(stages)
    ]
    if model.untie_embeddings_and_output_weights:
        output = _InitializedLayer(StageOutput, model, vocab_size, prefix="output", **options)
    else:
        output = _InitializedTiedLayer(
            "embedding",
            StageEmbedding,
            model,
            vocab_size,
            prefix="embedding",
            forward_fn=head,
            **options,
        )
    topology = PipeModelDataParallelTopology(
        num_pp=stages, num_mp=setup.grid.tensor, num_dp=setup.grid.data_context
    )
    # The constructor prints the layers, and copies tied weights to the last stage in place, which
    # autograd would reject.
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), torch.no_grad():
        return PipelineModule(
            [embedding, *layers, output],
            topology=topology,
            loss_fn=torch.mul,  # the loss sum times the scale, which is passed as the label
            partition_method="type:StageLayers",
            # The number of documents differs between micro-batches.
            dynamic_shape=config.data.reset_attention_mask,
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
