"""Bytes of parameters, gradients and optimizer state on one process, as DeepSpeed 0.19.8 keeps them under ZeRO.

ZeRO (Rajbhandari et al. 2020, section 5) splits over all processes that hold the same parameters, here D x C: stage 1
the optimizer's state, 2 gradients too, 3 parameters too. Adam has two moments of 4 bytes each. DeepSpeed keeps
besides a float32 copy of the weights it updates: under ZeRO in float32 as well, where it is one more than needed.

Counted as well is what exists only while gradients are reduced: a bucket, into which they are copied on their way,
and under ZeRO 3 the parameters gathered from the other processes. DeepSpeed gives them back only when more than
stage3_max_live_parameters are there, so that a smaller model is there whole.
"""

from dataclasses import dataclass

import torch

MASTER_AND_MOMENTS = 12
"""Bytes of a parameter's float32 copy and of Adam's two moments."""
_WIDE = torch.float32.itemsize


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's choices that cost memory. ``ranks`` are D x C; the rest has DeepSpeed's names and defaults."""

    stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one process. ``update`` is needed in the optimizer's step alone; ``host`` is in the CPU's memory."""

    parameters: int
    gradients: int
    bucket: int
    optimizer: int
    update: int
    host: int


def model_states(count: int, dtype: torch.dtype, zero: Zero) -> ModelStates:
    """The states of ``count`` parameters of ``dtype`` that this process computes with."""
    if zero.stage == 0:
        return _without_zero(count, dtype, zero)
    own = -(-count // zero.ranks)
    optimizer = MASTER_AND_MOMENTS * own
    gradients = dtype.itemsize * (count if zero.stage == 1 else own)
    update = _WIDE * own
    kept = dtype.itemsize * (own if zero.stage == 3 else count)
    gathered = (
        dtype.itemsize * min(count, zero.max_live_parameters)
        if zero.stage == 3 and zero.ranks > 1
        else 0
    )
    host = (
        optimizer + dtype.itemsize * own + update
    ) * zero.offload_optimizer + kept * zero.offload_param
    return ModelStates(
        parameters=gathered + kept * (not zero.offload_param),
        gradients=gradients * (not zero.offload_optimizer),
        # Under ZeRO 3 it is of the type that travels, float32; else of the gradients'.
        bucket=zero.reduce_bucket_size * (_WIDE if zero.stage == 3 else dtype.itemsize),
        optimizer=optimizer * (not zero.offload_optimizer),
        update=update * (not zero.offload_optimizer),
        host=host,
    )


def _without_zero(count: int, dtype: torch.dtype, zero: Zero) -> ModelStates:
    """Plain Adam in float32; else one with a float32 copy, which takes float32 gradients too while it steps."""
    half = dtype != torch.float32
    flattened = min(count, zero.reduce_bucket_size) * dtype.itemsize if zero.ranks > 1 else 0
    return ModelStates(
        parameters=dtype.itemsize * count,
        gradients=dtype.itemsize * count,
        bucket=0,
        optimizer=(MASTER_AND_MOMENTS if half else MASTER_AND_MOMENTS - _WIDE) * count,
        update=max(_WIDE * count * half, flattened),
        host=0,
    )
