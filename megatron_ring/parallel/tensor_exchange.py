"""Communication of the tensor axis around a pair of split layers: an all-reduce, or its two halves.

A column-parallel and a row-parallel layer need no communication between them, and around them one
all-reduce forward and one backward (Shoeybi et al. 2019, Megatron-LM, section 3). With
``sequence_parallel`` (Korthikanti et al. 2022, section 4.2.2) the tokens outside the pair are split
over the same ranks: a reduce-scatter after the pair replaces the all-reduce, an all-gather before
it supplies all tokens, and the two move as many bytes as the all-reduce.

In shapes, ``m`` is the number of a process's tokens outside the pairs: l, or l/T with
sequence_parallel. All collectives block, in the tensor group, in the order of the model, which is
the same on all of its ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional


@dataclass(frozen=True)
class TensorParallel:
    """This process's position on the tensor axis; ``group`` is None for an axis of one rank."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False

    @staticmethod
    def of(group: dist.ProcessGroup | None, sequence_parallel: bool) -> "TensorParallel":
        """Return this process's position in ``group``, the tensor axis."""
        if group is None:
            return ALONE
        return TensorParallel(
            group, dist.get_rank(group), dist.get_world_size(group), sequence_parallel
        )

    def part(self, whole: int) -> range:
        """Return this rank's indices of ``whole``: contiguous in rank order, shorter at the end."""
        share = -(-whole // self.size)
        return range(min(self.rank * share, whole), min((self.rank + 1) * share, whole))


ALONE = TensorParallel()
"""A tensor axis of one rank."""


def to_tensor_region(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Enter column-parallel layers: (B, m, E) -> (B, l, E); backward sums the ranks' gradients."""
    if tensor.size == 1:
        return x
    if tensor.sequence_parallel:
        return _Exchange.apply(x, tensor, _all_gathered, _reduce_scattered)
    return _Exchange.apply(x, tensor, _unchanged, all_reduced)


class SharedInput:
    """The input of one or several column-parallel layers, where backward treats it specially.

    shard_BmE: under sequence parallelism (Korthikanti et al. 2022, section 4.2.2) the rank's own
        shard of the input, which is stored instead of the all-gather's result; the first of the
        layers whose weight gradient is computed gathers the whole (B, l, E) again, once for all
        layers. None: the input itself is stored.
    sums_in_products: add up the layers' gradients for the input in their matrix products, instead
        of one after the other in separate passes over memory.
    """

    def __init__(
        self, shard_BmE: torch.Tensor | None, tensor: TensorParallel, sums_in_products: bool = False
    ):
        self.shard_BmE = None if shard_BmE is None else shard_BmE.detach()
        self.gather = None if shard_BmE is None else _GatherForBackward(tensor)
        self.gradient_sum = _GradientSum() if sums_in_products else None

    def linear(
        self, x_BlE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``x_BlE weight^T + bias`` for the ``x_BlE`` that all layers share."""
        if self.gather is not None:
            self.gather.layers += 1
        if self.gradient_sum is not None:
            self.gradient_sum.layers += 1
        kept = x_BlE if self.shard_BmE is None else self.shard_BmE
        return _LinearOfSharedInput.apply(x_BlE, kept, weight, bias, self.gather, self.gradient_sum)


class _GradientSum:
    """Sums the gradients that ``layers`` layers have for their input, in their matrix products.

    Autograd gets nothing from the layers before the last, and the whole sum from that.
    """

    def __init__(self):
        self.layers = 0
        self._pending_layers = 0
        self._sum_NE: torch.Tensor | None = None

    def add(self, dy_No: torch.Tensor, weight_oE: torch.Tensor) -> torch.Tensor | None:
        """Add ``dy weight``; return the sum if it was the last layer's, else None."""
        if self._sum_NE is None:
            self._sum_NE = dy_No.mm(weight_oE)
            self._pending_layers = self.layers
        else:
            self._sum_NE.addmm_(dy_No, weight_oE)
        self._pending_layers -= 1
        if self._pending_layers:
            return None
        sum_NE, self._sum_NE = self._sum_NE, None
        return sum_NE


class _GatherForBackward:
    """Gathers a shard once for ``layers`` layers, and keeps the result until the last has used it.

    It holds no tensor between forward and backward: the shard is among the saved tensors of
    autograd, where activation offloading can move it.
    """

    def __init__(self, tensor: TensorParallel):
        self.tensor = tensor
        self.layers = 0
        self._pending_layers = 0
        self._whole_BlE: torch.Tensor | None = None

    def whole(self, shard_BmE: torch.Tensor) -> torch.Tensor:
        """Return the gathered (B, l, E); the first call blocks in a tensor group's all-gather."""
        if self._whole_BlE is None:
            self._whole_BlE = _all_gathered(shard_BmE, self.tensor)
            self._pending_layers = self.layers
        whole_BlE = self._whole_BlE
        self._pending_layers -= 1
        if self._pending_layers == 0:
            self._whole_BlE = None
        return whole_BlE


class _LinearOfSharedInput(torch.autograd.Function):
    """A linear layer that saves its input or the shard it was gathered from (``SharedInput``).

    The weight is saved as the parameter itself: under ZeRO 3 it is gathered in place for backward.
    """

    @staticmethod
    def forward(ctx, x_BlE, kept, weight, bias, gather, gradient_sum):
        ctx.gather = gather
        ctx.gradient_sum = gradient_sum
        ctx.save_for_backward(kept, weight)
        return functional.linear(x_BlE, weight, bias)

    @staticmethod
    def backward(ctx, dy_Blo):
        kept, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dy_No = dy_Blo.flatten(0, -2)
        dx_BlE = dweight = dbias = None
        if needs_x and ctx.gradient_sum is None:
            dx_BlE = dy_Blo.matmul(weight)
        elif needs_x:
            dx_NE = ctx.gradient_sum.add(dy_No, weight)
            dx_BlE = None if dx_NE is None else dx_NE.view(*dy_Blo.shape[:-1], -1)
        if needs_weight:
            x_BlE = kept if ctx.gather is None else ctx.gather.whole(kept)
            dweight = dy_No.t().matmul(x_BlE.flatten(0, -2))
        if needs_bias:
            dbias = dy_No.sum(0)
        return dx_BlE, None, dweight, dbias, None, None


def from_tensor_region(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Leave row-parallel layers: sum (B, l, E) over the ranks and return this rank's (B, m, E)."""
    if tensor.size == 1:
        return x
    if tensor.sequence_parallel:
        return _Exchange.apply(x, tensor, _reduce_scattered, _all_gathered)
    return _Exchange.apply(x, tensor, all_reduced, _unchanged)


def local_tokens(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Return this rank's m of l tokens of x (..., l); all of them without sequence_parallel.

    No gradient flows through it.
    """
    return x.chunk(tensor.size, dim=-1)[tensor.rank] if tensor.sequence_parallel else x


class _Exchange(torch.autograd.Function):
    """Applies one function of (x, tensor) in forward and another one in backward."""

    @staticmethod
    def forward(ctx, x, tensor, in_forward, in_backward):
        ctx.tensor = tensor
        ctx.in_backward = in_backward
        return in_forward(x, tensor)

    @staticmethod
    def backward(ctx, dx):
        return ctx.in_backward(dx, ctx.tensor), None, None, None


def all_reduced(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Return the sum of ``x`` over the tensor ranks, a new tensor; blocks."""
    copy = x.clone(memory_format=torch.contiguous_format)
    return all_reduce_(copy, tensor.group, dist.ReduceOp.SUM)


def all_reduce_(x: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> torch.Tensor:
    """Reduce ``x`` over ``group`` in place and return it; blocks."""
    dist.all_reduce(x, op, group)
    return x


def _unchanged(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    return x.view_as(x)


def _all_gathered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = x.new_empty(tensor.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=tensor.group)
    return torch.cat(parts.chunk(tensor.size), dim=1)


def _reduce_scattered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = torch.cat(x.chunk(tensor.size, dim=1))
    own = parts.new_empty(parts.shape[0] // tensor.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=tensor.group)
    return own
