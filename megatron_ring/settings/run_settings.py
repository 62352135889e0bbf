"""The resolved settings of a run, derived from its config and number of processes.

Everything is checked here before anything is started, without communication. So ``--dry-run`` and
every illegal request end here, with all problems reported together.
"""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError
from megatron_ring.kernels.attention import KernelChoice, choose
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.registry import Feature
from megatron_ring.kernels.fused import choose_libraries
from megatron_ring.kernels.fused.libraries import Operation
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import deepspeed_config, lengths, rules
from megatron_ring.settings.precision import Precision, device_type, precision

_MAX_ROPE_HEAD_DIM = 256  # of fused RoPE; a larger head dim is a separate operation


@dataclass(frozen=True)
class RunSettings:
    """The resolved settings of a run.

    stripe_reason: why --stripe-size auto has that size. device: "cpu" or "cuda". kernel: the
    attention kernel. operations: the libraries that compute the other fused operations.
    micro_batches: forward-backward passes of one optimizer step on each data rank. deepspeed:
    DeepSpeed's config.
    """

    config: Config
    grid: Grid
    layout: Layout
    stripe_reason: str
    device: str
    precision: Precision
    kernel: KernelChoice
    operations: choose_libraries.OperationChoices
    global_batch_size: int
    micro_batches: int
    deepspeed: dict[str, Any]

    @property
    def tokens_per_rank(self) -> int:
        """The tokens l = L/U of a sequence that each process holds."""
        return self.layout.shard_length // self.grid.ulysses

    @staticmethod
    def resolve(config: Config, world_size: int) -> "RunSettings":
        """Resolve ``config`` for a number of processes.

        Raises ConfigError with all problems, or KernelUnavailable if a kernel or library was
        requested by name and cannot be used. DeepSpeed's extra keys are compared with derived ones,
        so they are checked only when everything else is legal.
        """
        device = device_type()
        if problems := _problems(config, world_size, device):
            raise ConfigError(problems)
        grid = Grid.of(config.parallel, world_size)
        dtype = precision(config.training.dtype, device)
        mask = _mask_kind(config)
        kernel = choose(
            config.parallel.attention_kernel,
            device,
            dtype.dtype,
            config.model.head_dim,
            _attention_features(config),
            mask=mask,
        )
        layout, stripe_reason = lengths.layout(config, grid, kernel.name, device, mask)
        sequences_per_micro_batch = config.training.micro_batch_size * grid.data
        global_batch_size = config.training.global_batch_size or sequences_per_micro_batch
        micro_batches = global_batch_size // sequences_per_micro_batch
        return RunSettings(
            config=config,
            grid=grid,
            layout=layout,
            stripe_reason=stripe_reason,
            device=device,
            precision=dtype,
            kernel=kernel,
            operations=_fused_operations(config, grid, device, dtype.dtype),
            global_batch_size=global_batch_size,
            micro_batches=micro_batches,
            deepspeed=deepspeed_config.derive(config, grid, micro_batches, dtype.name),
        )


def _problems(config: Config, world_size: int, device: str) -> list[str]:
    """Return the problems of the sections, then of the grid, or of the rules on a legal grid.

    Grid and rules compute with the values, so they are skipped if any is unusable.
    """
    problems = config.problems()
    if config.unusable_values() or config.parallel.problems():
        return problems
    if of_grid := degrees.problems(config.parallel, world_size, config.dry_run):
        return problems + of_grid
    return problems + rules.problems(config, Grid.of(config.parallel, world_size), device)


def _attention_features(config: Config) -> list[Feature]:
    """Return what the attention kernel must support, besides the dtype and the head dim."""
    model = config.model
    is_invariant = config.parallel.context_parallel_reduction == "invariant"
    required = {
        Feature.DOCUMENTS: config.data.reset_attention_mask,
        Feature.WINDOW: model.window_size > 0,
        Feature.GROUPED_HEADS: model.key_value_heads != model.num_attention_heads,
        Feature.SINKS: model.softmax_type != "vanilla",
        Feature.SOFT_CAP: model.attn_logit_softcapping != 0,
        Feature.DROPOUT: model.attention_dropout != 0,
        Feature.DETERMINISM: config.training.deterministic or is_invariant,
    }
    return [feature for feature, is_required in required.items() if is_required]


# On an H100 (measured.py) the kernel for documents saves 31.2 ms of 39.6 million visible pairs of
# documents, and the kernel for one document 24.0 ms of 268 million of one document: per pair, 8.8
# times as much.
_SPARSE_SAVING_OVER_CAUSAL = 8.8


def _mask_kind(config: Config) -> MaskKind:
    """Return the mask by which kernel and stripes are chosen, where layers have different ones.

    With --window-attn-skip-freq it is the one for which the wrong kernel would cost more.
    """
    model = config.model
    if config.data.reset_attention_mask or model.window_size == 0:
        return MaskKind.of(_attention_features(config))
    length = config.data.seq_length
    windows = [model.window_of(layer) for layer in range(model.num_layers)]
    full = sum(length / 2 for window in windows if window == 0)
    within_windows = sum(min(window, length / 2) for window in windows if window > 0)
    is_mostly_full = full > _SPARSE_SAVING_OVER_CAUSAL * within_windows
    return MaskKind.CAUSAL if is_mostly_full else MaskKind.SPARSE


def _fused_operations(
    config: Config, grid: Grid, device: str, dtype: torch.dtype
) -> choose_libraries.OperationChoices:
    """Choose a library for each operation of the run that libraries have fused."""
    model = config.model
    training = config.training
    has_rope = model.position_embedding_type == "rope"
    used = {
        Operation.RMS_NORM: model.normalization == "RMSNorm",
        Operation.LAYER_NORM: model.normalization == "LayerNorm",
        Operation.ROPE: has_rope and model.head_dim <= _MAX_ROPE_HEAD_DIM,
        Operation.WIDE_ROPE: has_rope and model.head_dim > _MAX_ROPE_HEAD_DIM,
        Operation.SWIGLU: model.activation == "swiglu",
        Operation.CROSS_ENTROPY: grid.tensor == 1,
        Operation.SPLIT_CROSS_ENTROPY: grid.tensor > 1,
        Operation.ADAMW: True,
    }
    operations = [operation for operation, is_used in used.items() if is_used]
    return choose_libraries.choose(
        training.fused_operations, device, dtype, operations, training.deterministic
    )
