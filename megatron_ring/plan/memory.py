"""Peak bytes of a process in a training step, by pipeline stage, counted before the start.

Parameters, gradients and optimizer state are counted as DeepSpeed 0.19.8 keeps them under ZeRO,
what a layer keeps and needs by activations.py. Added are the embedding and the head, the
micro-batches in flight, and which of these coincide. Not counted are the workspace of vendor
kernels, the allocator's rounding, communicators and the interpreter.

ZeRO (Rajbhandari et al. 2020, section 5) shards over all processes that hold the same parameters,
here D x C: stage 1 the optimizer state, 2 also gradients, 3 also parameters. Adam has two moments
of 4 bytes each. DeepSpeed also keeps a float32 copy of the weights that it updates, under ZeRO even
of float32 weights. Counted too is what exists only while gradients are reduced: a bucket that they
are copied into (its size: settings/deepspeed_config.py), and under ZeRO 3 the parameters gathered
from the other processes. DeepSpeed releases these only when more than stage3_max_live_parameters
exist, so a smaller model stays whole.
"""

from dataclasses import dataclass

import torch

from megatron_ring.config import Config
from megatron_ring.parallel.grid import Grid, layers_of_stage
from megatron_ring.plan.activations import layer_bytes
from megatron_ring.plan.parameters import parameters_of_stage, share
from megatron_ring.settings.deepspeed_config import MAX_BUCKET_ELEMENTS, reduce_bucket_elements

ERROR = 0.1
"""Largest relative error against measured peaks, tested for one process and for two."""

_FP32 = torch.float32.itemsize
_MASTER_AND_MOMENTS = 3 * _FP32  # per parameter: the float32 copy and Adam's two moments
_IDS_PER_TOKEN = 3 * torch.int64.itemsize  # id, position and target


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed's settings that affect memory, with DeepSpeed's defaults; ``ranks`` is D x C.

    reduce_bucket_size: in elements; None: sized by the model.
    """

    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int | None = None
    max_live_parameters: int = 1_000_000_000


@dataclass(frozen=True)
class Workload:
    """All that memory depends on.

    tokens: B x l, of a micro-batch on this process. device: "cpu" or "cuda".
    """

    config: Config
    grid: Grid
    tokens: int
    vocab_size: int
    micro_batches: int
    dtype: torch.dtype
    device: str
    zero: ZeroSettings


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a process of one stage. parameters, gradients, optimizer: between steps as well.

    bucket: for reducing gradients. activations: kept from forward to backward. working: on top of
    these, where it is largest, in a layer or in the head. update: on top of gradients, in the
    optimizer's step. host: offloaded to CPU memory. peak: the most at any time.
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
    """Return the bytes of a process of ``stage``, on the tensor rank with the largest part."""
    config = load.config
    count = parameters_of_stage(
        config.model, load.vocab_size, config.data.seq_length, load.grid, stage
    )
    states = model_states(count, load.dtype, load.zero)
    activations, offloaded = _kept(load, stage)
    working = _working(load, stage)
    host = states.host + offloaded
    # Gradients exist at the peak of activations if an earlier micro-batch left them, or ZeRO 3
    # allocated them.
    gradients_exist = load.micro_batches > 1 or load.zero.stage == 3
    in_backward = activations + working + (states.gradients if gradients_exist else 0)
    in_update = states.gradients + states.update
    host_on_device = host if load.device == "cpu" else 0  # offloading frees nothing on a CPU
    lasting = states.parameters + states.optimizer + states.bucket
    return StageMemory(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        bucket=states.bucket,
        activations=activations,
        working=working,
        update=states.update,
        host=host,
        peak=lasting + max(in_backward, in_update) + host_on_device,
    )


# ---- parameters, gradients and optimizer state ----


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one process; ``update`` only in the optimizer's step, ``host`` in CPU memory."""

    parameters: int
    gradients: int
    bucket: int
    optimizer: int
    update: int
    host: int


def model_states(count: int, dtype: torch.dtype, zero: ZeroSettings) -> ModelStates:
    """Return the bytes for ``count`` parameters of ``dtype`` that this process uses."""
    if zero.stage == 0:
        return _without_zero(count, dtype, zero)
    size = dtype.itemsize
    shard = -(-count // zero.ranks)
    optimizer = _MASTER_AND_MOMENTS * shard
    gradients = size * (count if zero.stage == 1 else shard)
    update = _FP32 * shard
    kept = size * (shard if zero.stage == 3 else count)
    gathered = 0
    if zero.stage == 3 and zero.ranks > 1:
        gathered = size * min(count, zero.max_live_parameters)
    host = 0
    if zero.offload_optimizer:
        host += optimizer + size * shard + update
    if zero.offload_param:
        host += kept
    return ModelStates(
        parameters=gathered + (0 if zero.offload_param else kept),
        gradients=0 if zero.offload_optimizer else gradients,
        # Under ZeRO 3 the bucket has the type of communication, float32; else that of gradients.
        bucket=bucket_elements(count, zero) * (_FP32 if zero.stage == 3 else size),
        optimizer=0 if zero.offload_optimizer else optimizer,
        update=0 if zero.offload_optimizer else update,
        host=host,
    )


def bucket_elements(count: int, zero: ZeroSettings) -> int:
    """Return the elements of the bucket of a process with ``count`` parameters."""
    if zero.reduce_bucket_size == 0:
        return 0  # DeepSpeed has none with this optimizer
    return reduce_bucket_elements(count, zero.reduce_bucket_size)


def _without_zero(count: int, dtype: torch.dtype, zero: ZeroSettings) -> ModelStates:
    """Return the bytes of plain Adam in float32, or of Adam with a float32 copy.

    The latter also makes float32 gradients during its step.
    """
    size = dtype.itemsize
    is_half = dtype != torch.float32
    flattened = min(count, MAX_BUCKET_ELEMENTS) * size if zero.ranks > 1 else 0
    per_parameter = _MASTER_AND_MOMENTS if is_half else _MASTER_AND_MOMENTS - _FP32
    fp32_gradients = _FP32 * count if is_half else 0
    return ModelStates(
        parameters=size * count,
        gradients=size * count,
        bucket=0,
        optimizer=per_parameter * count,
        update=max(fp32_gradients, flattened),
        host=0,
    )


# ---- activations and working memory ----


def micro_batches_in_flight(stages: int, stage: int, micro_batches: int) -> int:
    """Return the most micro-batches of which a stage has run forward and not yet backward.

    Under 1F1B (Narayanan et al. 2021, section 2.2).
    """
    return min(stages - stage, micro_batches)


def bubble(stages: int, micro_batches: int) -> float:
    """Return the fraction of a step in which a stage is idle, if all stages are equal.

    (P - 1) / (M + P - 1), from the same source.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def _kept(load: Workload, stage: int) -> tuple[int, int]:
    """Return the bytes kept from forward to backward, on the device and in CPU memory."""
    config = load.config
    stages = load.grid.pipe
    layers = len(layers_of_stage(config.model.num_layers, stages, stage))
    per_layer = layer_bytes(config, load.grid, load.dtype, load.device).kept
    on_device = min(layers, 2) if config.memory.offload_activations else layers
    tokens = micro_batches_in_flight(stages, stage, load.micro_batches) * load.tokens
    kept = tokens * (on_device * per_layer + _outside_layers(load, stage))
    offloaded = tokens * (layers - on_device) * per_layer
    return round(kept), round(offloaded)


def _outside_layers(load: Workload, stage: int) -> float:
    """Return the bytes per token outside the layers.

    These are its ids, RoPE's cos and sin, what stages receive and send, and the final norm.
    """
    model = load.config.model
    stages = load.grid.pipe
    split = load.grid.tensor if load.config.parallel.sequence_parallel else 1
    stream = load.dtype.itemsize * model.hidden_size / split
    rotation = _FP32 * model.head_dim if model.position_embedding_type == "rope" else 0
    received_and_sent = stream * ((stage > 0) + (stage < stages - 1))
    # The final norm's input and output; the output is freed as its gradient is made.
    final_norm = 2 * stream if stage == stages - 1 else 0
    return _IDS_PER_TOKEN + rotation + received_and_sent + final_norm


def _working(load: Workload, stage: int) -> int:
    in_layer = load.tokens * layer_bytes(load.config, load.grid, load.dtype, load.device).working
    in_head = _head(load) if stage == load.grid.pipe - 1 else 0
    return round(max(in_layer, in_head))


def _head(load: Workload) -> int:
    """Return the bytes of a chunk's logits and of the weight's gradient.

    Both are in float32, and for smaller types also in their own.
    """
    chunk = load.config.memory.loss_chunk_size or load.tokens
    rows = share(load.vocab_size, load.grid.tensor)
    per_element = _FP32
    if load.dtype != torch.float32:
        per_element += load.dtype.itemsize
    return (min(chunk, load.tokens) + load.config.model.hidden_size) * rows * per_element
