"""From what was settled to what trains: the model, whole or as a stage of a pipeline, and the engine that drives it."""

import torch

from megatron_ring.engine.engine import Engine
from megatron_ring.engine.pipeline_engine import PipelineEngine, pipelined
from megatron_ring.model.attention import AttentionFunction
from megatron_ring.model.execution import Execution
from megatron_ring.model.gpt import GPT
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor_exchange import TensorParallel
from megatron_ring.settings.setup import Setup


def build_model(
    setup: Setup, groups: ProcessGroups, attention: AttentionFunction, vocab_size: int
) -> torch.nn.Module:
    """This process's part of the model; all processes build theirs at the same time."""
    config = setup.config
    tensor = TensorParallel.of(groups.tensor, config.parallel.sequence_parallel)
    execution = Execution.of(config, tensor, setup.operations.operations)
    parts = (
        config.model,
        vocab_size,
        config.data.seq_length,
        attention,
        config.training.seed,
        execution,
    )
    if setup.grid.pipe == 1:
        return GPT(*parts)
    return pipelined(setup.grid, config.data.reset_attention_mask, *parts)


def start_engine(model: torch.nn.Module, setup: Setup, groups: ProcessGroups) -> Engine:
    """DeepSpeed around ``model``."""
    engine = Engine if setup.grid.pipe == 1 else PipelineEngine
    return engine(model, setup, groups)
