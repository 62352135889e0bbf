"""Build the model, whole or as a pipeline stage, and the engine that trains it."""

import torch

from megatron_ring.engine.engine import Engine
from megatron_ring.engine.pipeline_engine import PipelineEngine, build_stage
from megatron_ring.engine.zero3_partitions import zero3_partitioner
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.gpt import GPT
from megatron_ring.model.initialization import build
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor_exchange import TensorParallel
from megatron_ring.settings.run_settings import RunSettings


def build_model(
    setup: RunSettings, groups: ProcessGroups, attention: AttentionFunction, vocab_size: int
) -> torch.nn.Module:
    """Build and initialize this process's part of the model, with the device and type of the run.

    Collective over all processes. A process allocates only what it keeps, and a few blocks of 16
    MiB on the CPU.
    """
    config = setup.config
    tensor = TensorParallel.of(groups.tensor, config.parallel.sequence_parallel)
    if setup.grid.pipe > 1:
        return build_stage(setup, attention, vocab_size, tensor)
    return build(
        GPT,
        config.model,
        vocab_size,
        config.data.seq_length,
        attention,
        tensor=tensor,
        operations=setup.operations.operations,
        memory=config.memory,
        seed=config.training.seed,
        device=setup.device,
        dtype=setup.precision.dtype,
        partition=zero3_partitioner(setup, groups),
    )


def start_engine(model: torch.nn.Module, setup: RunSettings, groups: ProcessGroups) -> Engine:
    """Wrap ``model`` in a DeepSpeed engine. Collective over all processes."""
    engine = Engine if setup.grid.pipe == 1 else PipelineEngine
    return engine(model, setup, groups)
