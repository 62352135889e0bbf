"""A ring within one process: a thread per rank, and queues for links. Each rank receives a copy of its own.

It runs the package's own ``ring.forward`` and ``ring.backward`` on a whole sequence: shards it by the layout, and puts
the results back in the sequence's order.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import NamedTuple

import torch

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
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
    """The n-th transfer that a rank starts meets the n-th of the others, in whatever order they are awaited.

    slots[ring_rank][n]: what the n-th transfer brings to that rank. sent: the bytes of each transfer started here.
    """

    def __init__(self, ring_rank: int, slots: list[list[Queue]]):
        self.ring_rank, self.slots = ring_rank, slots
        self.sent: list[int] = []

    def start(self, tensor: torch.Tensor, distance: int = 1) -> QueueTransfer:
        assert tensor.is_contiguous(), "only contiguous tensors can be sent"
        number, receiver = len(self.sent), (self.ring_rank + distance) % len(self.slots)
        self.slots[receiver][number].put(tensor.clone())
        self.sent.append(tensor.numel() * tensor.itemsize)
        return QueueTransfer(tensor, tensor._version, self.slots[self.ring_rank][number])

    def hang_up(self) -> None:
        """Let nobody wait for what will not be sent."""
        for slots in self.slots:
            for slot in slots[len(self.sent) :]:
                slot.put(None)


class Exchanges(NamedTuple):
    """The bytes of the transfers that each rank started, one after another."""

    forward: list[list[int]]
    backward: list[list[int]]


class RingRun(NamedTuple):
    results: Attention
    exchanges: Exchanges


def run(
    layout: Layout,
    kernel: HopKernel,
    q_BSHD,
    k_BSGD,
    v_BSGD,
    dout_BSHD,
    mask: Mask = CAUSAL,
    dlse_BHS=None,
    **settings,
) -> RingRun:
    """Attention of a batch of whole sequences, and its gradients, by a ring of ``layout.ring_size`` threads.

    Where the mask has several samples, the batch's are laid end to end, as the model's are. ``settings``: of the Ring.
    """
    positions = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    scale = q_BSHD.shape[-1] ** -0.5

    def shards(x: torch.Tensor) -> list[torch.Tensor]:
        return [_laid_end_to_end(x[:, at], mask) for at in positions]

    q, dout, kv = (
        shards(q_BSHD),
        shards(dout_BSHD),
        [torch.stack(pair) for pair in zip(shards(k_BSGD), shards(v_BSGD))],
    )
    dlse = [None] * layout.ring_size if dlse_BHS is None else [x.mT for x in shards(dlse_BHS.mT)]

    def forward(ring: ring_loop.Ring):
        return ring_loop.forward(q[ring.ring_rank], kv[ring.ring_rank], ring)

    forwards, forward_exchanges = _on_every_rank(layout, kernel, scale, mask, forward, settings)

    def backward(ring: ring_loop.Ring):
        rank = ring.ring_rank
        return ring_loop.backward(dout[rank], dlse[rank], q[rank], kv[rank], *forwards[rank], ring)

    backwards, backward_exchanges = _on_every_rank(layout, kernel, scale, mask, backward, settings)
    (outs, lses), (dqs, dkvs) = zip(*forwards), zip(*backwards)
    order, dks, dvs = torch.cat(positions).argsort(), *zip(*dkvs)

    def whole(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([_taken_apart(x, mask) for x in parts], dim=1)[:, order]

    results = Attention(
        whole(outs), whole(dqs), whole(dks), whole(dvs), whole(lse.mT for lse in lses).mT
    )
    return RingRun(results, Exchanges(forward_exchanges, backward_exchanges))


def _laid_end_to_end(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return x.unflatten(0, (-1, mask.samples)).flatten(1, 2)


def _taken_apart(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return x.unflatten(1, (mask.samples, -1)).flatten(0, 1)


def _on_every_rank(
    layout: Layout,
    kernel: HopKernel,
    scale: float,
    mask: Mask,
    body: Callable[[ring_loop.Ring], tuple],
    settings: dict,
):
    """``body`` in a thread per rank: what each returned and what it sent. The first failure is raised here."""
    size = layout.ring_size
    slots = [[Queue() for _ in range(2 * size)] for _ in range(size)]
    exchanges = [QueueExchange(rank, slots) if size > 1 else None for rank in range(size)]

    def rank_body(rank: int):
        try:
            return body(
                ring_loop.Ring(layout, rank, kernel, scale, exchanges[rank], mask, **settings)
            )
        finally:
            if exchanges[rank]:
                exchanges[rank].hang_up()

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(rank_body, rank) for rank in range(size)]
    failures = [future.exception() for future in futures if future.exception()]
    if failures:
        raise next(
            (failure for failure in failures if not isinstance(failure, LinkBroken)), failures[0]
        )
    return [future.result() for future in futures], [
        exchange.sent if exchange else [] for exchange in exchanges
    ]
