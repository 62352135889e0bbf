"""What a process of each pipeline stage holds in memory, in words, as plan/memory.py counts it from a setup."""

import torch

from megatron_ring.config import Config
from megatron_ring.data.manifest import tokenizer_path
from megatron_ring.data.prepare import DEFAULT_VOCAB_SIZE
from megatron_ring.data.tokenizer import Tokenizer
from megatron_ring.errors import DataError
from megatron_ring.parallel.stages import layers_of_stage
from megatron_ring.plan.activations import layer_bytes, papers_bytes_per_token
from megatron_ring.plan.memory import (
    ERROR,
    StageMemory,
    Workload,
    micro_batches_in_flight,
    stage_memory,
)
from megatron_ring.plan.zero import Zero
from megatron_ring.settings.setup import Setup

ASSUMED_VOCAB_SIZE = 32_000
"""For a text whose tokenizer is not at hand."""

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


def memory_lines(setup: Setup) -> list[str]:
    """A row for each pipeline stage, and what the columns leave open."""
    vocab_size, reason = vocabulary(setup.config)
    stages = memory_of_stages(setup, vocab_size)
    title = "stage  layers" + "".join(f"{name:>12}" for name in _COLUMNS)
    rows = []
    for stage, memory in enumerate(stages):
        layers = len(layers_of_stage(setup.config.model.num_layers, setup.grid.pipe, stage))
        rows.append(
            f"{stage:>5}{layers:>8}"
            + "".join(f"{human(getattr(memory, name)):>12}" for name in _COLUMNS)
        )
    peaks = ", ".join(f"{memory.peak:,}" for memory in stages)
    return [
        f"memory           of a process, for {vocab_size:,} token ids, {reason}; tests hold the peak to within "
        f"{ERROR:.0%} of what is measured.",
        "                 bucket: DeepSpeed's, for reducing gradients; working: besides activations, in a layer or the "
        "head; update: in the optimizer's step.",
        "                 Kernels' workspace, and what libraries take for themselves, is not counted.",
        title,
        *rows,
        f"peak             {peaks} bytes by stage",
        *_a_layers_share(setup),
    ]


def vocabulary(config: Config) -> tuple[int, str]:
    """How many token ids to plan with, and why so many."""
    if config.model.padded_vocab_size:
        return config.model.padded_vocab_size, "by padded_vocab_size"
    data = config.data
    if not data.data_path and not data.tokenizer_model:
        return DEFAULT_VOCAB_SIZE, "which the tokenizer of the default text has"
    path = data.tokenizer_model or tokenizer_path(next(iter(data.blend)))
    try:
        return Tokenizer.load(path).vocab_size, f"by {path}"
    except DataError:
        return ASSUMED_VOCAB_SIZE, f"assumed, as {path} cannot be read"


def memory_of_stages(setup: Setup, vocab_size: int) -> list[StageMemory]:
    """What a process of each pipeline stage holds."""
    load = _workload(setup, vocab_size)
    return [stage_memory(load, stage) for stage in range(setup.grid.pipe)]


def _workload(setup: Setup, vocab_size: int) -> Workload:
    return Workload(
        config=setup.config,
        grid=setup.grid,
        tokens=setup.config.training.micro_batch_size * setup.resident_length,
        vocab_size=vocab_size,
        micro_batches=setup.micro_batches,
        dtype=setup.precision.dtype,
        device=setup.device,
        zero=_zero(setup),
    )


def _zero(setup: Setup) -> Zero:
    """DeepSpeed's choices; what its config does not say has DeepSpeed's defaults."""
    # In a pipeline without ZeRO, bfloat16 gets an optimizer that splits its state as ZeRO 1 does, and has no bucket.
    stage, bfloat16 = setup.config.training.zero_stage, setup.precision.dtype == torch.bfloat16
    if setup.grid.pipe > 1 and bfloat16 and stage == 0:
        return Zero(stage=1, ranks=setup.grid.data_context, reduce_bucket_size=0)
    said, memory = setup.deepspeed["zero_optimization"], setup.config.memory
    return Zero(
        stage=stage,
        ranks=setup.grid.data_context,
        offload_optimizer=memory.offload_optimizer == "cpu",
        offload_param=memory.offload_param == "cpu",
        reduce_bucket_size=int(said.get("reduce_bucket_size", Zero.reduce_bucket_size)),
        max_live_parameters=int(said.get("stage3_max_live_parameters", Zero.max_live_parameters)),
    )


def _a_layers_share(setup: Setup) -> list[str]:
    of_layer = layer_bytes(setup.config, setup.grid, setup.precision.dtype, setup.device)
    papers = papers_bytes_per_token(setup.config.model.hidden_size)
    in_flight = micro_batches_in_flight(setup.grid.pipe, 0, setup.micro_batches)
    flying = (
        f", {in_flight} micro-batches in flight on the first stage" if setup.grid.pipe > 1 else ""
    )
    return [
        f"activations      {of_layer.kept:,.0f} bytes a token and layer with --recompute "
        f"{setup.config.memory.recompute}, {of_layer.working:,.0f} more in the layer at work{flying}; Ring Attention's "
        f"6 x hidden, bf16: {papers:,}"
    ]


def human(count: int) -> str:
    """Bytes to four digits or so, in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B" if count else "-"
