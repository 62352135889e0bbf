"""Layers whose weights are split over the ranks of the tensor axis (Shoeybi et al. 2019, Megatron-LM, section 3).

A column-parallel layer splits its outputs, a row-parallel one its inputs, an embedding the vocabulary. They come in
pairs, around which ``tensor_exchange.py`` communicates: ``to_tensor_region`` before the first layer,
``from_tensor_region`` after the second. In shapes, ``m`` is a process's tokens outside the pairs.
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
    ShardKept,
    TensorParallel,
    from_tensor_region,
    reduced,
    summed,
)


@dataclass(frozen=True)
class Split:
    """The part of a whole parameter that a tensor rank holds: ``indices`` of dimension ``dim``, of size ``whole``."""

    dim: int
    indices: range
    whole: int


def split_of(parameter: nn.Parameter) -> Split | None:
    """How ``parameter`` is split over the tensor axis; None where every rank has all of it."""
    return getattr(parameter, "tensor_parallel_split", None)


def split_parameter(whole_shape: tuple[int, ...], dim: int, tensor: TensorParallel) -> nn.Parameter:
    """An empty parameter that holds this rank's part of ``whole_shape`` along ``dim``."""
    indices = tensor.part(whole_shape[dim])
    parameter = nn.Parameter(torch.empty(*whole_shape[:dim], len(indices), *whole_shape[dim + 1 :]))
    if tensor.size > 1:
        parameter.tensor_parallel_split = Split(dim, indices, whole_shape[dim])
        parameter.tensor_model_parallel = (
            True  # DeepSpeed's word for: counts on every rank in the gradient norm
        )
    return parameter


def part_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of what this tensor rank has of ``parameter``, which ZeRO 3 hides between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape that ``parameter`` has on one process."""
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

    def forward(self, x: torch.Tensor, kept: ShardKept | None = None) -> torch.Tensor:
        """Apply the layer to what ``to_tensor_region`` gives, so that several layers share one exchange.

        ``kept``: what backward keeps of ``x``; None: ``x`` itself.
        """
        if kept is None:
            return functional.linear(x, self.weight, self.bias)
        return kept.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W, the inputs, split: (B, l, in/T) -> (B, m, out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((outputs, inputs), 1, tensor)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = from_tensor_region(functional.linear(x, self.weight), self.tensor)
        return y if self.bias is None else y + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """Rows of a table, the table's rows split: int64 (B, l) -> (B, m, width). Uneven parts are no harm."""

    def __init__(self, vocab_size: int, width: int, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((vocab_size, width), 0, tensor)

    def forward(self, tokens_Bl: torch.Tensor) -> torch.Tensor:
        split = split_of(self.weight)
        if split is None:
            return functional.embedding(tokens_Bl, self.weight)
        row = tokens_Bl - split.indices.start
        here = (row >= 0) & (row < len(split.indices))
        # A row of another rank counts as zeros; the sum over ranks brings it.
        x = functional.embedding(torch.where(here, row, 0), self.weight) * here.unsqueeze(-1)
        return from_tensor_region(x, self.tensor)


def mark_local_heads(module: nn.Module) -> nn.Module:
    """``module``, marked as one that every tensor rank holds whole and applies to its own heads only."""
    for parameter in module.parameters():
        parameter.sees_own_heads_only = True
    return module


def all_reduce_replicated_grads(module: nn.Module, tensor: TensorParallel) -> None:
    """Have the gradients of what every tensor rank holds whole summed over them, once, where each saw a part only.

    Under sequence_parallel a rank sees its own tokens of everything. Without it every rank sees all tokens, and such
    gradients are equal already, but for those of parameters that meet a rank's own heads.
    """
    for parameter in module.parameters():
        in_part = tensor.sequence_parallel or getattr(parameter, "sees_own_heads_only", False)
        if tensor.size > 1 and split_of(parameter) is None and in_part:
            parameter.register_hook(functools.partial(summed, tensor=tensor))


def vocabulary_part(weight_vE: torch.Tensor, tensor: TensorParallel) -> VocabularyPart | None:
    """Which rows of a head's matrix ``weight_vE`` are, and how the parts meet; None where it is whole."""
    split = split_of(weight_vE)
    if split is None:
        return None
    return VocabularyPart(
        split.indices.start,
        sum=functools.partial(reduced, group=tensor.group, op=dist.ReduceOp.SUM),
        max=functools.partial(reduced, group=tensor.group, op=dist.ReduceOp.MAX),
    )
