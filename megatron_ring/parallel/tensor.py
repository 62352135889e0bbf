"""Layers with weights split over the tensor axis (Shoeybi et al. 2019, Megatron-LM, section 3).

A column-parallel layer splits its outputs, a row-parallel one its inputs, an embedding the
vocabulary. They come in pairs, around which ``tensor_exchange.py`` communicates:
``to_tensor_region`` before the first layer, ``from_tensor_region`` after the second. In shapes,
``m`` is the number of a process's tokens outside the pairs.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from megatron_ring.kernels.cross_entropy import VocabularyPart
from megatron_ring.parallel.tensor_exchange import (
    ALONE,
    SharedInput,
    TensorParallel,
    all_reduce_,
    all_reduced,
    from_tensor_region,
)


@dataclass(frozen=True)
class Split:
    """A tensor rank's part of a parameter: ``indices`` of dimension ``dim``, of size ``whole``."""

    dim: int
    indices: range
    whole: int


def split_of(parameter: nn.Parameter) -> Split | None:
    """Return how ``parameter`` is split over the tensor axis; None if every rank has all of it."""
    return getattr(parameter, "tensor_parallel_split", None)


def split_parameter(whole_shape: tuple[int, ...], dim: int, tensor: TensorParallel) -> nn.Parameter:
    """Create an uninitialised parameter for this rank's part of ``whole_shape`` along ``dim``."""
    indices = tensor.part(whole_shape[dim])
    parameter = nn.Parameter(torch.empty(*whole_shape[:dim], len(indices), *whole_shape[dim + 1 :]))
    if tensor.size > 1:
        parameter.tensor_parallel_split = Split(dim, indices, whole_shape[dim])
        # DeepSpeed's mark of parameters that count on every rank in the gradient norm.
        parameter.tensor_model_parallel = True
    return parameter


def part_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of this tensor rank's part of ``parameter``, also while ZeRO 3 shards it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape that ``parameter`` has without tensor parallelism."""
    split = split_of(parameter)
    shape = list(part_shape(parameter))
    if split:
        shape[split.dim] = split.whole
    return tuple(shape)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W, the outputs, split: (B, m, in) -> (B, l, out/T)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((outputs, inputs), 0, tensor)
        self.bias = split_parameter((outputs,), 0, tensor) if bias else None

    def forward(self, x: torch.Tensor, shared: SharedInput | None = None) -> torch.Tensor:
        """Apply the layer to a result of ``to_tensor_region``, which several layers may share.

        ``shared`` is what the layers that share ``x`` have in common; None: nothing.
        """
        if shared is None:
            return functional.linear(x, self.weight, self.bias)
        return shared.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W, the inputs, split: (B, l, in/T) -> (B, m, out).

    Communicates in the tensor group and blocks.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((outputs, inputs), 1, tensor)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = from_tensor_region(functional.linear(x, self.weight), self.tensor)
        return y if self.bias is None else y + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """An embedding with the rows of its table split: int64 (B, l) -> (B, m, width).

    The parts may be uneven. Communicates in the tensor group and blocks.
    """

    def __init__(self, vocab_size: int, width: int, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((vocab_size, width), 0, tensor)

    def forward(self, tokens_Bl: torch.Tensor) -> torch.Tensor:
        split = split_of(self.weight)
        if split is None:
            return functional.embedding(tokens_Bl, self.weight)
        row = tokens_Bl - split.indices.start
        is_local = (row >= 0) & (row < len(split.indices))
        # Rows of other ranks are zeros here and are filled in by the sum over ranks.
        local_row = torch.where(is_local, row, 0)
        x = functional.embedding(local_row, self.weight) * is_local.unsqueeze(-1)
        return from_tensor_region(x, self.tensor)


def mark_local_heads(module: nn.Module) -> nn.Module:
    """Mark ``module`` as replicated over tensor ranks but applied to each rank's heads only."""
    for parameter in module.parameters():
        parameter.sees_own_heads_only = True
    return module


def all_reduce_replicated_grads(module: nn.Module, tensor: TensorParallel) -> None:
    """Register hooks that sum gradients of replicated parameters over tensor ranks where needed.

    With sequence_parallel a rank computes their gradients from its own tokens only. Without it
    every rank has all tokens and these gradients are equal already, except for parameters that are
    applied to a rank's own heads only.
    """
    for parameter in module.parameters():
        is_partial = tensor.sequence_parallel or getattr(parameter, "sees_own_heads_only", False)
        if tensor.size > 1 and split_of(parameter) is None and is_partial:
            parameter.register_hook(functools.partial(all_reduced, tensor=tensor))


def vocabulary_part(weight_vE: torch.Tensor, tensor: TensorParallel) -> VocabularyPart | None:
    """Return which rows of the head's matrix ``weight_vE`` has, and how to reduce over the parts.

    None if the matrix is not split.
    """
    split = split_of(weight_vE)
    if split is None:
        return None
    return VocabularyPart(
        split.indices.start,
        sum=functools.partial(all_reduce_, group=tensor.group, op=dist.ReduceOp.SUM),
        max=functools.partial(all_reduce_, group=tensor.group, op=dist.ReduceOp.MAX),
    )
