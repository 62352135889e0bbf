"""Resolves the options of an inference command, by the rules of a training run."""

from dataclasses import replace

from megatron_ring.config import (
    Config,
    DataConfig,
    InferenceConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings.run_settings import RunSettings


def resolve_settings(
    config: InferenceConfig, model: ModelConfig, trained_length: int, world_size: int
) -> RunSettings:
    """Return grid, dtype, attention kernel and fused operations; raises as a training run does.

    A sequence may have any length at inference, so the rules get a length that fits the layout.
    Packed documents are required of the kernel, because a batch of prompts is one packed sequence.
    """
    multiple = 2 * world_size * config.stripe_size
    run = Config(
        model=replace(model, attention_dropout=0.0),
        parallel=ParallelConfig(
            context_parallel=config.context_parallel,
            context_parallel_size=config.context_parallel_size,
            stripe_size=1 if config.context_parallel == "none" else config.stripe_size,
            attention_kernel=config.attention_kernel,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            world_size=config.world_size,
        ),
        data=DataConfig(
            seq_length=-(-trained_length // multiple) * multiple, reset_attention_mask=True
        ),
        training=TrainingConfig(dtype=config.dtype, fused_operations=config.fused_operations),
        dry_run=config.dry_run,
    )
    settings = RunSettings.resolve(run, world_size)
    _check_no_data_ranks(config, settings.grid)
    return settings


def _check_no_data_ranks(config: InferenceConfig, grid: Grid) -> None:
    if grid.data == 1:
        return
    used = grid.context * grid.tensor
    remedy = f"--context-parallel-size {grid.data * grid.context}"
    if config.context_parallel == "none":
        remedy = "--context-parallel striped"
    raise ConfigError(
        f"{grid.world_size} processes are {grid.data} data ranks of {used} (context_parallel_size "
        f"{grid.context} x tensor_model_parallel_size {grid.tensor}), and inference has no data "
        f"parallelism. Set {remedy} so that one sequence is split over all of them, or start "
        f"{used}."
    )


def sequence_positions(config: InferenceConfig, model: ModelConfig, trained_length: int) -> int:
    """Return the positions that a sequence may have: --seq-length, or those of the model.

    Raises ConfigError where --seq-length exceeds a learned position table.
    """
    if config.seq_length <= trained_length or model.position_embedding_type == "rope":
        return config.seq_length or trained_length
    raise ConfigError(
        f"seq_length {config.seq_length} is more than the {trained_length} rows of the model's "
        f"learned position table, which cannot be extended. Set --seq-length to at most "
        f"{trained_length}."
    )
