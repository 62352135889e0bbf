"""A ring loop in three runs: its computation alone, its communication alone, and both together."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.ring_hop import Exchange, Ring, Transfer
from megatron_ring.kernels.attention import HopKernel


class Seconds(NamedTuple):
    """Times of one run: the slowest rank's, except ``waited``, which is the mean over the ranks."""

    forward: float
    backward: float
    both: float
    waited: float


@dataclass(frozen=True)
class Shard:
    """The tensors of this rank and the layout and kernel that they are for."""

    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor
    layout: Layout
    kernel: HopKernel

    def run(self, kernel: HopKernel, exchange: Exchange) -> Seconds:
        """Time forward and backward after a common start; blocks on all ranks."""
        timed = TimedExchange(exchange)
        ring = Ring(self.layout, dist.get_rank(), kernel, self.q.shape[-1] ** -0.5, timed)
        dist.barrier()
        start = time.perf_counter()
        out, lse = ring_loop.forward(self.q, self.kv, ring)
        middle = time.perf_counter()
        ring_loop.backward(self.dout, None, self.q, self.kv, out, lse, ring)
        end = time.perf_counter()
        return _over_ranks(Seconds(middle - start, end - middle, end - start, timed.waited))

    @functools.cached_property
    def sent(self) -> int:
        """Bytes that this rank sends in one run."""
        exchange = NullExchange()
        self.run(NullKernel, exchange)
        return exchange.sent

    def runs(self, exchange: Exchange) -> dict[str, Callable[[], Seconds]]:
        return {
            "compute": lambda: self.run(self.kernel, NullExchange()),
            "communication": lambda: self.run(NullKernel, exchange),
            "together": lambda: self.run(self.kernel, exchange),
        }


def _over_ranks(local: Seconds) -> Seconds:
    """Return the maximum over all ranks, and the mean of ``waited``."""
    ranks = [torch.empty(len(local), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, torch.tensor(local, dtype=torch.float64))
    stacked = torch.stack(ranks)
    forward, backward, both, _ = stacked.max(dim=0).values.tolist()
    waited = stacked.mean(dim=0)[-1].item()
    return Seconds(forward, backward, both, waited)


# ---- kernels and exchanges that leave out a part, or time it ----


@dataclass(frozen=True)
class NullTransfer:
    """A transfer that "receives" the tensor that was sent."""

    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


@dataclass
class NullExchange:
    """An exchange that sends nothing and counts the bytes that a rank would send."""

    sent: int = 0

    def start(self, tensor: torch.Tensor, distance: int = 1) -> NullTransfer:
        self.sent += tensor.nbytes
        return NullTransfer(tensor)


class NullKernel:
    """A kernel that computes nothing."""

    @staticmethod
    def forward(*arguments) -> None:
        """Leave the running softmax unchanged."""

    @staticmethod
    def backward(*arguments) -> None:
        """Add nothing to the gradients."""


@dataclass
class TimedExchange:
    """An exchange that also records the seconds spent waiting for its transfers."""

    exchange: Exchange
    waited: float = 0.0

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "TimedTransfer":
        return TimedTransfer(self.exchange.start(tensor, distance), self)


@dataclass(frozen=True)
class TimedTransfer:
    transfer: Transfer
    timed: TimedExchange

    def wait(self) -> torch.Tensor:
        start = time.perf_counter()
        tensor = self.transfer.wait()
        self.timed.waited += time.perf_counter() - start
        return tensor
