"""Tensor parallelism: layers whose weights are split over the ranks of the tensor axis, and what these exchange.

Megatron-LM's pair (Shoeybi et al. 2019, section 3): a column-parallel layer splits its outputs, a row-parallel one its
inputs, so that between the two nothing is exchanged, and around them one sum forward and one backward. With
``sequence_parallel`` (Korthikanti et al. 2022, section 4.2.2) the tokens outside the pair are split over the same
ranks: what was a sum becomes a reduce-scatter, and an all-gather stands before the pair. The two cost the same.

In shapes, ``m`` is a process's tokens between the pairs: l, or l/T with sequence_parallel. Everything is done by
blocking collectives of the tensor group, in the order of the model, which is the same on all of its ranks.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from megatron_ring.kernels.cross_entropy import VocabularyPart


@dataclass(frozen=True)
class TensorParallel:
    """This process's place on the tensor axis. ``group`` is None where it has one rank: nothing is exchanged then."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False

    @staticmethod
    def of(group: dist.ProcessGroup | None, sequence_parallel: bool) -> "TensorParallel":
        """This process's place in ``group``, the tensor axis."""
        if group is None:
            return ALONE
        return TensorParallel(group, dist.get_rank(group), dist.get_world_size(group), sequence_parallel)

    def part(self, whole: int) -> range:
        """The indices of ``whole`` that belong to this rank: runs in rank order, the last ones shorter if uneven."""
        share = -(-whole // self.size)
        return range(min(self.rank * share, whole), min((self.rank + 1) * share, whole))


ALONE = TensorParallel()
"""A tensor axis of one rank."""


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
        parameter.tensor_model_parallel = True  # DeepSpeed's word for: counts on every rank in the gradient norm
    return parameter


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape that ``parameter`` has on one process."""
    split = split_of(parameter)
    shape = list(parameter.shape)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes what ``enter`` gives, so that several such layers share one exchange."""
        return functional.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W, the inputs, split: (B, l, in/T) -> (B, m, out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel = ALONE):
        super().__init__()
        self.tensor = tensor
        self.weight = split_parameter((outputs, inputs), 1, tensor)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = leave(functional.linear(x, self.weight), self.tensor)
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
        return leave(x, self.tensor)


def enter(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Before column-parallel layers: (B, m, E) -> (B, l, E). Backward, the ranks' gradients are summed."""
    if tensor.size == 1:
        return x
    return _Gather.apply(x, tensor) if tensor.sequence_parallel else _SumBackward.apply(x, tensor)


def leave(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """After row-parallel products: the sum over the ranks of (B, l, E), of which a rank keeps its (B, m, E)."""
    if tensor.size == 1:
        return x
    return _SumScattered.apply(x, tensor) if tensor.sequence_parallel else _Sum.apply(x, tensor)


def own_tokens(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """This rank's m of l tokens, of (..., l): all of them without sequence_parallel. No gradient flows through it."""
    return x.chunk(tensor.size, dim=-1)[tensor.rank] if tensor.sequence_parallel else x


def sum_gradients_of_replicas(module: nn.Module, tensor: TensorParallel) -> None:
    """Have the gradients of what every tensor rank holds whole summed over them, where each saw its own tokens only.

    That is so under sequence_parallel. Without it every rank sees all tokens, and such gradients are equal already.
    """
    if tensor.size > 1 and tensor.sequence_parallel:
        for parameter in module.parameters():
            if split_of(parameter) is None:
                parameter.register_hook(functools.partial(_summed, tensor=tensor))


def vocabulary_part(weight_vE: torch.Tensor, tensor: TensorParallel) -> VocabularyPart | None:
    """Which rows of a head's matrix ``weight_vE`` are, and how the parts meet; None where it is whole."""
    split = split_of(weight_vE)
    if split is None:
        return None
    return VocabularyPart(
        split.indices.start,
        sum=functools.partial(_reduced, group=tensor.group, op=dist.ReduceOp.SUM),
        max=functools.partial(_reduced, group=tensor.group, op=dist.ReduceOp.MAX),
    )


class _SumBackward(torch.autograd.Function):
    """Nothing forward, a sum over the tensor ranks backward: each saw all of x in its own part of the weights."""

    @staticmethod
    def forward(ctx, x, tensor):
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return _summed(dx, ctx.tensor), None


class _Sum(torch.autograd.Function):
    """A sum over the tensor ranks forward, nothing backward."""

    @staticmethod
    def forward(ctx, x, tensor):
        return _summed(x, tensor)

    @staticmethod
    def backward(ctx, dx):
        return dx, None


class _Gather(torch.autograd.Function):
    """(B, l/T, E) -> (B, l, E) forward; summed and scattered backward."""

    @staticmethod
    def forward(ctx, x, tensor):
        ctx.tensor = tensor
        return _gathered(x, tensor)

    @staticmethod
    def backward(ctx, dx):
        return _summed_and_scattered(dx, ctx.tensor), None


class _SumScattered(torch.autograd.Function):
    """(B, l, E) summed over the tensor ranks -> (B, l/T, E) forward; gathered backward."""

    @staticmethod
    def forward(ctx, x, tensor):
        ctx.tensor = tensor
        return _summed_and_scattered(x, tensor)

    @staticmethod
    def backward(ctx, dx):
        return _gathered(dx, ctx.tensor), None


def _summed(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    return _reduced(x.clone(memory_format=torch.contiguous_format), tensor.group, dist.ReduceOp.SUM)


def _reduced(x: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> torch.Tensor:
    dist.all_reduce(x, op, group)
    return x


def _gathered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = x.new_empty(tensor.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=tensor.group)
    return torch.cat(parts.chunk(tensor.size), dim=1)


def _summed_and_scattered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = torch.cat(x.chunk(tensor.size, dim=1))
    own = parts.new_empty(parts.shape[0] // tensor.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=tensor.group)
    return own
