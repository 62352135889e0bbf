"""Bytes on one process at the peak of a training step, for every pipeline stage, before anything is started.

What lasts is counted by zero.py, what a layer keeps and needs by activations.py; here both are put together with the
model's two ends, the micro-batches in flight and the moments at which they meet. Not counted are the workspace of a
vendor's kernels, the allocator's rounding, communicators and the interpreter itself.
"""

from dataclasses import dataclass

import torch

from megatron_ring.config import Config
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.stages import layers_of_stage
from megatron_ring.plan.activations import layer_bytes
from megatron_ring.plan.parameters import parameters_of_stage, share
from megatron_ring.plan.zero import Zero, model_states

ERROR = 0.1
"""How far a plan may be from what is measured: tests hold it to that, for one process and for two."""

_WIDE = torch.float32.itemsize
_NUMBERS_OF_A_TOKEN = 3 * torch.int64.itemsize  # id, position and target


@dataclass(frozen=True)
class Workload:
    """What memory follows from. tokens: of a micro-batch that are here, B x l. device: "cpu" or "cuda"."""

    config: Config
    grid: Grid
    tokens: int
    vocab_size: int
    micro_batches: int
    dtype: torch.dtype
    device: str
    zero: Zero


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a process of one stage. parameters, gradients and optimizer last.

    bucket: in which gradients are reduced. activations: kept from forward to backward. working: besides, where that is
    most, in a layer or in the head. update: besides the gradients, in the optimizer's step. host: offloaded to the
    CPU's memory. peak: the most at once.
    """

    parameters: int
    gradients: int
    optimizer: int
    bucket: int
    activations: int
    working: int
    update: int
    host: int
    peak: int


def stage_memory(load: Workload, stage: int) -> StageMemory:
    """The bytes of a process on pipeline stage ``stage``, of the tensor rank that has the largest part."""
    config, grid = load.config, load.grid
    count = parameters_of_stage(config.model, load.vocab_size, config.data.seq_length, grid, stage)
    states = model_states(count, load.dtype, load.zero)
    activations, offloaded = _kept(load, stage)
    working, host = _working(load, stage), states.host + offloaded
    # Gradients are there while activations are at their most if a micro-batch has left them, or ZeRO 3 their place.
    lasting = states.gradients if load.micro_batches > 1 or load.zero.stage == 3 else 0
    moments = activations + working + lasting, states.gradients + states.update
    on_cpu = host if load.device == "cpu" else 0  # where offloading makes no room
    return StageMemory(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        bucket=states.bucket,
        activations=activations,
        working=working,
        update=states.update,
        host=host,
        peak=states.parameters + states.optimizer + states.bucket + max(moments) + on_cpu,
    )


def micro_batches_in_flight(stages: int, stage: int, micro_batches: int) -> int:
    """Those that a stage has taken forward and not yet back, at the most: 1F1B (Narayanan et al. 2021, section 2.2)."""
    return min(stages - stage, micro_batches)


def bubble(stages: int, micro_batches: int) -> float:
    """The share of a step in which a stage waits, (P - 1) / (M + P - 1), all stages being alike (ibid.)."""
    return (stages - 1) / (micro_batches + stages - 1)


def _kept(load: Workload, stage: int) -> tuple[int, int]:
    """Bytes kept from forward to backward on the device, and in the CPU's memory."""
    config, grid = load.config, load.grid
    layers = len(layers_of_stage(config.model.num_layers, grid.pipe, stage))
    of_layer = layer_bytes(config, grid, load.dtype, load.device).kept
    on_device = min(layers, 2) if config.memory.offload_activations else layers
    in_flight = micro_batches_in_flight(grid.pipe, stage, load.micro_batches) * load.tokens
    kept = in_flight * (on_device * of_layer + _ends(load, stage))
    return round(kept), round(in_flight * (layers - on_device) * of_layer)


def _ends(load: Workload, stage: int) -> float:
    """What a token has beside its layers: its numbers, RoPE's cos and sin, what stages hand over, the final norm."""
    model, pipe = load.config.model, load.grid.pipe
    split = load.grid.tensor if load.config.parallel.sequence_parallel else 1
    stream = load.dtype.itemsize * model.hidden_size / split
    rotation = _WIDE * model.head_dim if model.position_embedding_type == "rope" else 0
    handed_over = stream * ((stage > 0) + (stage < pipe - 1))
    # The final norm's input and output: the second makes room for its gradient.
    final_norm = 2 * stream if stage == pipe - 1 else 0
    return _NUMBERS_OF_A_TOKEN + rotation + handed_over + final_norm


def _working(load: Workload, stage: int) -> int:
    in_layer = load.tokens * layer_bytes(load.config, load.grid, load.dtype, load.device).working
    return round(max(in_layer, _head(load) if stage == load.grid.pipe - 1 else 0))


def _head(load: Workload) -> int:
    """Logits of a chunk and the weight's gradient, both in float32, and for smaller types in their own as well."""
    chunk = load.config.memory.loss_chunk_size or load.tokens
    rows = share(load.vocab_size, load.grid.tensor)
    own = load.dtype.itemsize if load.dtype != torch.float32 else 0
    return (min(chunk, load.tokens) + load.config.model.hidden_size) * rows * (_WIDE + own)
