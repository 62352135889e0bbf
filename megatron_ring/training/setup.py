"""From a config and a number of processes to what a run is made of, checked as a whole before anything is started.

Nothing here talks to other processes, so ``--dry-run`` and every bad request end here, with all problems at once.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ring.config import Config
from megatron_ring.context_parallel.layout import Layout, auto_stripe_size
from megatron_ring.errors import ConfigError, nearest_multiples
from megatron_ring.kernels.attention import KernelChoice, choose, stripe_widths
from megatron_ring.kernels.attention.support import Feature
from megatron_ring.parallel.grid import Grid
from megatron_ring.training import deepspeed_config
from megatron_ring.training.precision import Precision, device_type, precision


@dataclass(frozen=True)
class Setup:
    """What is settled before the first process group.

    micro_batches: forward-backward passes of one optimizer step on each data rank. deepspeed: its config.
    """

    config: Config
    grid: Grid
    layout: Layout
    device: str
    precision: Precision
    kernel: KernelChoice
    global_batch_size: int
    micro_batches: int
    deepspeed: dict[str, Any]

    @staticmethod
    def of(config: Config, world_size: int) -> "Setup":
        """Raises ConfigError with everything that is wrong, KernelUnavailable for a kernel asked for in vain."""
        problems = config.problems()
        if not config.parallel.problems():
            problems += _sharing_problems(config, world_size)
        if problems:
            raise ConfigError(problems)
        grid = Grid.of(config.parallel, world_size)
        device = device_type()
        chosen = precision(config.training.dtype, device)
        features = _features(config)
        kernel = choose(config.parallel.attention_kernel, device, chosen.dtype, config.model.head_dim, features)
        per_micro_batch = config.training.micro_batch_size * grid.data
        global_batch_size = config.training.global_batch_size or per_micro_batch
        micro_batches = global_batch_size // per_micro_batch
        return Setup(
            config=config,
            grid=grid,
            layout=_layout(config, grid, kernel.name, device),
            device=device,
            precision=chosen,
            kernel=kernel,
            global_batch_size=global_batch_size,
            micro_batches=micro_batches,
            deepspeed=deepspeed_config.derive(config, grid, micro_batches, chosen.name),
        )


def _sharing_problems(config: Config, world_size: int) -> list[str]:
    """Why the processes cannot share the work out among them, by a grid or on it."""
    if problems := Grid.problems(config.parallel, world_size):
        return problems
    grid = Grid.of(config.parallel, world_size)
    return _length_problems(config, grid) + _batch_problems(config, grid)


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
    }
    return [feature for feature, wanted in asked.items() if wanted]


def _laid_out_length(config: Config, grid: Grid) -> int:
    """seq_length, but for single striped tokens, which are dealt out whatever their number: the last row is filled."""
    ragged = config.parallel.context_parallel == "striped" and config.parallel.stripe_size in ("auto", 1)
    return -(-config.data.seq_length // grid.ring) * grid.ring if ragged else config.data.seq_length


def _layout(config: Config, grid: Grid, kernel: str, device: str) -> Layout:
    parallel, seq_length = config.parallel, _laid_out_length(config, grid)
    stripe_size = parallel.stripe_size
    if stripe_size == "auto":
        widths = stripe_widths(kernel, device) if parallel.context_parallel == "striped" else ()
        stripe_size = auto_stripe_size(seq_length, grid.ring, widths, packed=config.data.reset_attention_mask)
    return Layout(parallel.context_parallel, seq_length, grid.ring, stripe_size)


def _length_problems(config: Config, grid: Grid) -> list[str]:
    parallel = config.parallel
    stripe_size = 1 if parallel.stripe_size == "auto" else parallel.stripe_size
    if config.data.seq_length < 1 or stripe_size < 1:
        return []  # the sections have said so
    found = Layout.problems(parallel.context_parallel, _laid_out_length(config, grid), grid.ring, stripe_size)
    if stripe_size > 1 and parallel.context_parallel != "striped":
        found.append(
            f"stripe_size {parallel.stripe_size} has no effect while context_parallel is {parallel.context_parallel}. "
            "Set --stripe-size 1, or --context-parallel striped."
        )
    return found


def _batch_problems(config: Config, grid: Grid) -> list[str]:
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    if micro < 1 or whole == 0 or (whole > 0 and whole % (micro * grid.data) == 0):
        return []
    return [
        f"global_batch_size {whole} must be a positive multiple of {micro * grid.data} (micro_batch_size {micro} x "
        f"{grid.data} data ranks). Nearest: {nearest_multiples(whole, micro * grid.data)}. Set --global-batch-size."
    ]
