"""A ring within one process: a thread per rank, and queues for links. Each rank receives a copy of its own.

It runs the package's own ``ring.forward`` and ``ring.backward`` on a whole sequence: shards it by the layout, and puts
the results back in the sequence's order.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import NamedTuple

import torch

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import HopKernel
from tests.oracle import Attention


class LinkBroken(Exception):
    """The previous rank failed and will send no more."""


@dataclass(frozen=True)
class QueueTransfer:
    sent: torch.Tensor
    version: int
    arriving: Queue

    def wait(self) -> torch.Tensor:
        received = self.arriving.get()
        if received is None:
            raise LinkBroken
        assert self.sent._version == self.version, "a tensor was written to while it was being sent"
        return received


class QueueExchange:
    """The n-th transfer that a rank starts meets the n-th of its neighbours, in whatever order they are awaited."""

    def __init__(self, inbox: list[Queue], outbox: list[Queue]):
        self.inbox, self.outbox = inbox, outbox
        self.started = 0

    def start(self, tensor: torch.Tensor) -> QueueTransfer:
        assert tensor.is_contiguous(), "only contiguous tensors can be sent"
        self.outbox[self.started].put(tensor.clone())
        self.started += 1
        return QueueTransfer(tensor, tensor._version, self.inbox[self.started - 1])

    def hang_up(self) -> None:
        """Let nobody wait for what will not be sent."""
        for slot in self.outbox[self.started :]:
            slot.put(None)


class Exchanges(NamedTuple):
    """How many transfers each rank started."""

    forward: list[int]
    backward: list[int]


class RingRun(NamedTuple):
    results: Attention
    exchanges: Exchanges


def run(layout: Layout, kernel: HopKernel, q_BSHD, k_BSGD, v_BSGD, dout_BSHD) -> RingRun:
    """Attention of a whole sequence, and its gradients, by a ring of ``layout.ring_size`` threads."""
    positions = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    q, dout = ([x[:, at] for at in positions] for x in (q_BSHD, dout_BSHD))
    kv = [torch.stack([k_BSGD[:, at], v_BSGD[:, at]]) for at in positions]

    def forward(ring: ring_loop.Ring):
        return ring_loop.forward(q[ring.ring_rank], kv[ring.ring_rank], ring)

    forwards, forward_exchanges = _on_every_rank(layout, kernel, q_BSHD.shape[-1] ** -0.5, forward)

    def backward(ring: ring_loop.Ring):
        rank = ring.ring_rank
        return ring_loop.backward(dout[rank], q[rank], kv[rank], *forwards[rank], ring)

    backwards, backward_exchanges = _on_every_rank(layout, kernel, q_BSHD.shape[-1] ** -0.5, backward)
    (outs, lses), (dqs, dkvs) = zip(*forwards), zip(*backwards)
    order = torch.cat(positions).argsort()
    dk, dv = torch.cat(dkvs, dim=2)[:, :, order]
    results = Attention(
        torch.cat(outs, 1)[:, order], torch.cat(dqs, 1)[:, order], dk, dv, torch.cat(lses, 2)[..., order]
    )
    return RingRun(results, Exchanges(forward_exchanges, backward_exchanges))


def _on_every_rank(layout: Layout, kernel: HopKernel, scale: float, body: Callable[[ring_loop.Ring], tuple]):
    """``body`` in a thread per rank: what each returned and how often it sent. The first failure is raised here."""
    size = layout.ring_size
    slots = [[Queue() for _ in range(2 * size)] for _ in range(size)]
    exchanges = [QueueExchange(slots[rank], slots[(rank + 1) % size]) if size > 1 else None for rank in range(size)]

    def rank_body(rank: int):
        try:
            return body(ring_loop.Ring(layout, rank, kernel, scale, exchanges[rank]))
        finally:
            if exchanges[rank]:
                exchanges[rank].hang_up()

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(rank_body, rank) for rank in range(size)]
    failures = [future.exception() for future in futures if future.exception()]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, LinkBroken)), failures[0])
    return [future.result() for future in futures], [exchange.started if exchange else 0 for exchange in exchanges]
