"""From a config and a number of processes to what a run is made of, checked as a whole before anything is started.

Nothing here talks to other processes, so ``--dry-run`` and every bad request end here, with all problems at once.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention import KernelChoice, choose
from megatron_ring.kernels.attention.support import Feature
from megatron_ring.kernels.fused import choice
from megatron_ring.kernels.fused.support import Operation
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import deepspeed_config, lengths, rules
from megatron_ring.settings.precision import Precision, device_type, precision


@dataclass(frozen=True)
class Setup:
    """What is settled before the first process group.

    operations: who computes what beside attention. micro_batches: forward-backward passes of one optimizer step on each
    data rank. deepspeed: its config.
    """

    config: Config
    grid: Grid
    layout: Layout
    device: str
    precision: Precision
    kernel: KernelChoice
    operations: choice.Choice
    global_batch_size: int
    micro_batches: int
    deepspeed: dict[str, Any]

    @property
    def resident_length(self) -> int:
        """l, the tokens of a sequence that a process is handed: L/U."""
        return self.layout.shard_length // self.grid.ulysses

    @staticmethod
    def of(config: Config, world_size: int) -> "Setup":
        """Raises ConfigError with everything that is wrong, KernelUnavailable for what was asked for by name in vain.

        Extras for DeepSpeed are compared with what is derived, so they are looked at when all else is right.
        """
        problems = config.problems()
        device = device_type()
        if not config.parallel.problems():
            problems += _problems_of_processes(config, world_size, device)
        if problems:
            raise ConfigError(problems)
        grid = Grid.of(config.parallel, world_size)
        chosen = precision(config.training.dtype, device)
        features = _features(config)
        kernel = choose(
            config.parallel.attention_kernel, device, chosen.dtype, config.model.head_dim, features
        )
        per_micro_batch = config.training.micro_batch_size * grid.data
        global_batch_size = config.training.global_batch_size or per_micro_batch
        micro_batches = global_batch_size // per_micro_batch
        return Setup(
            config=config,
            grid=grid,
            layout=lengths.layout(config, grid, kernel.name, device),
            device=device,
            precision=chosen,
            kernel=kernel,
            operations=_operations(config, grid, device, chosen.dtype),
            global_batch_size=global_batch_size,
            micro_batches=micro_batches,
            deepspeed=deepspeed_config.derive(config, grid, micro_batches, chosen.name),
        )


def _problems_of_processes(config: Config, world_size: int, device: str) -> list[str]:
    """Why the processes make no grid, or else what the rest of ``config`` cannot have of it and of their device."""
    if problems := degrees.problems(config.parallel, world_size, config.dry_run):
        return problems
    return rules.problems(config, Grid.of(config.parallel, world_size), device)


def _features(config: Config) -> list[Feature]:
    """What the run asks of its attention kernel beyond a type and a head size."""
    model = config.model
    asked = {
        Feature.DOCUMENTS: config.data.reset_attention_mask,
        Feature.WINDOW: model.window_size > 0,
        Feature.GROUPED_HEADS: model.key_value_heads != model.num_attention_heads,
        Feature.SINKS: model.softmax_type != "vanilla",
        Feature.SOFT_CAP: model.attn_logit_softcapping != 0,
        Feature.DROPOUT: model.attention_dropout != 0,
        Feature.DETERMINISM: config.training.deterministic
        or config.parallel.context_parallel_reduction == "invariant",
    }
    return [feature for feature, wanted in asked.items() if wanted]


def _operations(config: Config, grid: Grid, device: str, dtype: torch.dtype) -> choice.Choice:
    """Who computes what the run has of the operations that libraries have fused."""
    model, training = config.model, config.training
    rope = model.position_embedding_type == "rope"
    has = {
        Operation.RMS_NORM: model.normalization == "RMSNorm",
        Operation.LAYER_NORM: model.normalization == "LayerNorm",
        Operation.ROPE: rope and model.head_dim <= 256,
        Operation.WIDE_ROPE: rope and model.head_dim > 256,
        Operation.SWIGLU: model.activation == "swiglu",
        Operation.CROSS_ENTROPY: grid.tensor == 1,
        Operation.SPLIT_CROSS_ENTROPY: grid.tensor > 1,
        Operation.ADAMW: True,
    }
    wanted = [operation for operation, there in has.items() if there]
    return choice.choose(training.fused_operations, device, dtype, wanted, training.deterministic)
