"""What the ranks of the tensor axis exchange around a pair of split layers: a sum, or its two halves.

Between a column-parallel and a row-parallel layer nothing is exchanged, and around them one sum forward and one
backward (Shoeybi et al. 2019, Megatron-LM, section 3). With ``sequence_parallel`` (Korthikanti et al. 2022, section
4.2.2) the tokens outside the pair are split over the same ranks: a reduce-scatter stands behind it in the place of the
sum, an all-gather before it, and the two move as many bytes as the sum.

In shapes, ``m`` is a process's tokens outside the pairs: l, or l/T with sequence_parallel. Everything is done by
blocking collectives of the tensor group, in the order of the model, which is the same on all of its ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional


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
        return TensorParallel(
            group, dist.get_rank(group), dist.get_world_size(group), sequence_parallel
        )

    def part(self, whole: int) -> range:
        """The indices of ``whole`` that belong to this rank: runs in rank order, the last ones shorter if uneven."""
        share = -(-whole // self.size)
        return range(min(self.rank * share, whole), min((self.rank + 1) * share, whole))


ALONE = TensorParallel()
"""A tensor axis of one rank."""


def to_tensor_region(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """Before column-parallel layers: (B, m, E) -> (B, l, E). Backward, the ranks' gradients are summed."""
    if tensor.size == 1:
        return x
    ways = (_gathered, _summed_and_scattered) if tensor.sequence_parallel else (_as_it_is, summed)
    return _Exchange.apply(x, tensor, *ways)


class ShardKept:
    """The input of column-parallel layers under sequence parallelism, of which backward keeps a shard.

    Korthikanti et al. 2022, section 4.2.2: the all-gather's result is not stored for backward. Each
    rank stores its own (B, l/T, E), and the first of the layers whose weight gradient is computed
    gathers the whole (B, l, E) again, once for all layers that share it.
    """

    def __init__(self, shard_BmE: torch.Tensor, tensor: TensorParallel):
        self.shard_BmE = shard_BmE.detach()
        self.gather = _GatherForBackward(tensor)

    def linear(
        self, x_BlE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``x_BlE weight^T + bias`` for ``x_BlE`` as ``to_tensor_region`` gathered it from the shard."""
        self.gather.layers += 1
        return _LinearOfGathered.apply(x_BlE, self.shard_BmE, weight, bias, self.gather)


class _GatherForBackward:
    """Gathers a shard once for ``layers`` layers; holds the result until the last of them used it.

    It holds no tensor between forward and backward: the shard is among the saved tensors of
    autograd, where activation offloading can move it.
    """

    def __init__(self, tensor: TensorParallel):
        self.tensor = tensor
        self.layers = 0
        self._unserved = 0
        self._whole_BlE: torch.Tensor | None = None

    def whole(self, shard_BmE: torch.Tensor) -> torch.Tensor:
        """Return the gathered (B, l, E). The first call blocks in an all-gather of the tensor group."""
        if self._whole_BlE is None:
            self._whole_BlE, self._unserved = _gathered(shard_BmE, self.tensor), self.layers
        whole_BlE, self._unserved = self._whole_BlE, self._unserved - 1
        if self._unserved == 0:
            self._whole_BlE = None
        return whole_BlE


class _LinearOfGathered(torch.autograd.Function):
    """A linear layer that saves the shard its input was gathered from instead of the input.

    The weight is saved as the parameter itself: under ZeRO 3 it is gathered in place for backward.
    """

    @staticmethod
    def forward(ctx, x_BlE, shard_BmE, weight, bias, gather):
        ctx.gather = gather
        ctx.save_for_backward(shard_BmE, weight)
        return functional.linear(x_BlE, weight, bias)

    @staticmethod
    def backward(ctx, dy_Blo):
        shard_BmE, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx_BlE = dy_Blo.matmul(weight) if needs_x else None
        dweight = dbias = None
        if needs_weight:
            x_BlE = ctx.gather.whole(shard_BmE)
            dweight = dy_Blo.flatten(0, -2).t().matmul(x_BlE.flatten(0, -2))
        if needs_bias:
            dbias = dy_Blo.flatten(0, -2).sum(0)
        return dx_BlE, None, dweight, dbias, None


def from_tensor_region(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """After row-parallel products: the sum over the ranks of (B, l, E), of which a rank keeps its (B, m, E)."""
    if tensor.size == 1:
        return x
    ways = (_summed_and_scattered, _gathered) if tensor.sequence_parallel else (summed, _as_it_is)
    return _Exchange.apply(x, tensor, *ways)


def own_tokens(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """This rank's m of l tokens, of (..., l): all of them without sequence_parallel. No gradient flows through it."""
    return x.chunk(tensor.size, dim=-1)[tensor.rank] if tensor.sequence_parallel else x


class _Exchange(torch.autograd.Function):
    """``there`` forward and ``back`` backward, each from (x, tensor) to what takes x's place."""

    @staticmethod
    def forward(ctx, x, tensor, there, back):
        ctx.tensor, ctx.back = tensor, back
        return there(x, tensor)

    @staticmethod
    def backward(ctx, dx):
        return ctx.back(dx, ctx.tensor), None, None, None


def summed(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    """A new tensor: ``x`` summed over the tensor ranks."""
    return reduced(x.clone(memory_format=torch.contiguous_format), tensor.group, dist.ReduceOp.SUM)


def reduced(x: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> torch.Tensor:
    """``x`` reduced over ``group``, in place, and returned."""
    dist.all_reduce(x, op, group)
    return x


def _as_it_is(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    return x.view_as(x)


def _gathered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = x.new_empty(tensor.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=tensor.group)
    return torch.cat(parts.chunk(tensor.size), dim=1)


def _summed_and_scattered(x: torch.Tensor, tensor: TensorParallel) -> torch.Tensor:
    parts = torch.cat(x.chunk(tensor.size, dim=1))
    own = parts.new_empty(parts.shape[0] // tensor.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts, group=tensor.group)
    return own
