"""The memory lines of --dry-run: a table by pipeline stage of what plan/memory.py counts."""

import torch

from megatron_ring.config import Config
from megatron_ring.data.manifest import tokenizer_path
from megatron_ring.data.prepare import DEFAULT_VOCAB_SIZE
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError, counted
from megatron_ring.parallel.grid import layers_of_stage
from megatron_ring.plan.activations import layer_bytes, ring_attention_paper_bytes
from megatron_ring.plan.memory import (
    ERROR,
    StageMemory,
    Workload,
    ZeroSettings,
    bucket_elements,
    micro_batches_in_flight,
    stage_memory,
)
from megatron_ring.plan.parameters import parameters_of_stage
from megatron_ring.settings.deepspeed_config import MAX_BUCKET_ELEMENTS
from megatron_ring.settings.run_settings import RunSettings

ASSUMED_VOCAB_SIZE = 32_000
"""For a data set whose tokenizer cannot be read."""

# The columns of the table, fields of StageMemory.
_COLUMNS = (
    "parameters",
    "gradients",
    "optimizer",
    "bucket",
    "activations",
    "working",
    "update",
    "peak",
    "host",
)


def memory_lines(setup: RunSettings) -> list[str]:
    """Return a row for each pipeline stage, with an explanation of the columns."""
    vocab_size, reason = vocabulary(setup.config)
    stages = memory_of_stages(setup, vocab_size)
    header = "stage  layers" + "".join(f"{name:>12}" for name in _COLUMNS)
    rows = []
    for stage, memory in enumerate(stages):
        layers = len(layers_of_stage(setup.config.model.num_layers, setup.grid.pipe, stage))
        columns = (f"{human(getattr(memory, name)):>12}" for name in _COLUMNS)
        rows.append(f"{stage:>5}{layers:>8}" + "".join(columns))
    peaks = ", ".join(f"{memory.peak:,}" for memory in stages)
    return [
        f"memory           per process, for {vocab_size:,} token ids ({reason}); tests check that "
        f"the peak memory is within {ERROR:.0%} of the measured one",
        "                 bucket: DeepSpeed's, for reducing gradients; working: on top of "
        "activations, in a layer or the head; update: in the optimizer's step",
        "                 not counted: workspace of kernels, and memory of libraries",
        header,
        *rows,
        f"peak memory      {peaks} bytes by stage",
        *_bucket_lines(setup, vocab_size),
        _activations_line(setup),
    ]


def vocabulary(config: Config) -> tuple[int, str]:
    """Return the number of token ids to plan with, and where it comes from."""
    if config.model.padded_vocab_size:
        return config.model.padded_vocab_size, "padded_vocab_size"
    data = config.data
    if not data.data_path and not data.tokenizer_model:
        return DEFAULT_VOCAB_SIZE, "the tokenizer of the default text"
    path = data.tokenizer_model or tokenizer_path(next(iter(data.blend)))
    try:
        return Tokenizer.load(path).vocab_size, f"from {path}"
    except DataError:
        return ASSUMED_VOCAB_SIZE, f"assumed, because {path} cannot be read"


def memory_of_stages(setup: RunSettings, vocab_size: int) -> list[StageMemory]:
    """Return the memory of a process of each pipeline stage."""
    load = Workload(
        config=setup.config,
        grid=setup.grid,
        tokens=setup.config.training.micro_batch_size * setup.tokens_per_rank,
        vocab_size=vocab_size,
        micro_batches=setup.micro_batches,
        dtype=setup.precision.dtype,
        device=setup.device,
        zero=_zero_settings(setup),
    )
    return [stage_memory(load, stage) for stage in range(setup.grid.pipe)]


def _bucket_lines(setup: RunSettings, vocab_size: int) -> list[str]:
    """Return the elements of DeepSpeed's bucket on each stage, and where they come from."""
    zero = _zero_settings(setup)
    if zero.stage == 0 or zero.reduce_bucket_size == 0:
        return []  # DeepSpeed has no bucket then
    config = setup.config
    sizes = []
    for stage in range(setup.grid.pipe):
        count = parameters_of_stage(
            config.model, vocab_size, config.data.seq_length, setup.grid, stage
        )
        sizes.append(f"{bucket_elements(count, zero):,}")
    reason = f"the parameters of a process, at most DeepSpeed's {MAX_BUCKET_ELEMENTS:,}"
    if zero.reduce_bucket_size:
        reason = "set by reduce_bucket_size in the config's deepspeed"
    return [f"bucket           {', '.join(sizes)} elements by stage: {reason}"]


def _zero_settings(setup: RunSettings) -> ZeroSettings:
    """Return the settings of DeepSpeed's config, with DeepSpeed's defaults."""
    stage = setup.config.training.zero_stage
    ranks = setup.grid.data_context
    if setup.grid.pipe > 1 and setup.precision.dtype == torch.bfloat16 and stage == 0:
        # In a pipeline without ZeRO, bfloat16 has an optimizer that shards its state as ZeRO 1 does
        # and has no bucket.
        return ZeroSettings(stage=1, ranks=ranks, reduce_bucket_size=0)
    memory = setup.config.memory
    settings = setup.deepspeed["zero_optimization"]
    max_live = settings.get("stage3_max_live_parameters", ZeroSettings.max_live_parameters)
    return ZeroSettings(
        stage=stage,
        ranks=ranks,
        offload_optimizer=memory.offload_optimizer == "cpu",
        offload_param=memory.offload_param == "cpu",
        reduce_bucket_size=settings.get("reduce_bucket_size"),
        max_live_parameters=max_live,
    )


def _activations_line(setup: RunSettings) -> str:
    per_layer = layer_bytes(setup.config, setup.grid, setup.precision.dtype, setup.device)
    paper = ring_attention_paper_bytes(setup.config.model.hidden_size)
    line = (
        f"activations      {per_layer.kept:,.0f} bytes per token and layer with --recompute "
        f"{setup.config.memory.recompute}, {per_layer.working:,.0f} more in the current layer"
    )
    if setup.grid.pipe > 1:
        in_flight = micro_batches_in_flight(setup.grid.pipe, 0, setup.micro_batches)
        line += f", {counted(in_flight, 'micro-batch')} in flight on the first stage"
    return line + f"; Ring Attention's 6 x hidden, bf16: {paper:,}"


def human(count: int) -> str:
    """Format a number of bytes with two decimals, in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B" if count else "-"
