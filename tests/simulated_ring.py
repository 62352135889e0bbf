"""A ring within one process: a thread per rank, and queues as links. Each rank receives a copy.

It runs the package's ``ring.forward`` and ``ring.backward`` on a whole sequence: it shards the
sequence by the layout and restores the order of the results.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import NamedTuple

import torch

from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, concatenated_positions
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.parallel.peers import Peers, peers_at_distance
from tests.oracle import Attention


class LinkBroken(Exception):
    """The previous rank failed and will send nothing more."""


@dataclass(frozen=True)
class QueueTransfer:
    """One exchange in flight; checks that the sent tensor is not written to meanwhile."""

    sent: torch.Tensor
    version: int
    arriving: Queue
    into: torch.Tensor | None = None

    def wait(self) -> torch.Tensor:
        """Return the received tensor, or raise LinkBroken if the sender failed."""
        received = self.arriving.get()
        if received is None:
            raise LinkBroken
        assert self.sent._version == self.version, "a tensor was written to while it was being sent"
        if self.into is None:
            return received
        assert received.shape == self.into.shape
        return self.into.copy_(received)


class QueueExchange:
    """Pairs the n-th transfer of a rank with the n-th of the others, awaited in any order.

    Attributes:
        slots: slots[ring_rank][n] carries the n-th transfer to that rank.
        sent: the bytes of each transfer started here.
    """

    def __init__(self, ring_rank: int, slots: list[list[Queue]]):
        self.ring_rank = ring_rank
        self.slots = slots
        self.sent: list[int] = []

    def start(self, tensor: torch.Tensor, distance: int = 1) -> QueueTransfer:
        """Send ``tensor`` on by ``distance`` ranks; does not block."""
        peers = peers_at_distance(self.ring_rank, len(self.slots), distance)
        return self.start_with(peers, tensor)

    def start_with(
        self, peers: Peers, tensor: torch.Tensor, into: torch.Tensor | None = None
    ) -> QueueTransfer:
        """Send ``tensor`` to the receiver, and receive ``into`` a tensor; does not block."""
        assert tensor.is_contiguous(), "only contiguous tensors can be sent"
        number = len(self.sent)
        self.slots[peers.receiver][number].put(tensor.clone())
        self.sent.append(tensor.numel() * tensor.itemsize)
        return QueueTransfer(tensor, tensor._version, self.slots[self.ring_rank][number], into)

    def close(self) -> None:
        """Release all ranks that wait for transfers that this rank will not start."""
        for slots in self.slots:
            for slot in slots[len(self.sent) :]:
                slot.put(None)


class Exchanges(NamedTuple):
    """The bytes of the transfers that each rank started, in order."""

    forward: list[list[int]]
    backward: list[list[int]]


class RingRun(NamedTuple):
    """Results of a simulated ring, and what it sent."""

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
    in_memory: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    **settings,
) -> RingRun:
    """Compute attention of whole sequences, and its gradients, in a ring of threads.

    If the mask has several samples, those of the batch are concatenated, as in the model.
    ``in_memory`` returns a rank's q or dout in the memory layout in which the ring gets it; k and v
    are always dense. ``settings`` are more fields of the Ring.
    """
    positions_BL = [
        concatenated_positions(layout, ring_rank, mask).unflatten(0, (mask.samples, -1))
        - layout.seq_length * torch.arange(mask.samples)[:, None]
        for ring_rank in range(layout.ring_size)
    ]
    if mask.samples == 1:
        positions_BL = [p.expand(len(q_BSHD), -1) for p in positions_BL]
    scale = q_BSHD.shape[-1] ** -0.5

    def shards(x: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.arange(len(x))[:, None]
        return [_concatenate_samples(x[rows, local_BL], mask) for local_BL in positions_BL]

    q = [in_memory(x) for x in shards(q_BSHD)]
    dout = [in_memory(x) for x in shards(dout_BSHD)]
    kv = [torch.stack(pair) for pair in zip(shards(k_BSGD), shards(v_BSGD))]
    dlse = [None] * layout.ring_size if dlse_BHS is None else [x.mT for x in shards(dlse_BHS.mT)]

    def forward(ring: ring_loop.Ring):
        return ring_loop.forward(q[ring.ring_rank], kv[ring.ring_rank], ring)

    forwards, forward_exchanges = _on_every_rank(layout, kernel, scale, mask, forward, settings)

    def backward(ring: ring_loop.Ring):
        rank = ring.ring_rank
        return ring_loop.backward(dout[rank], dlse[rank], q[rank], kv[rank], *forwards[rank], ring)

    backwards, backward_exchanges = _on_every_rank(layout, kernel, scale, mask, backward, settings)
    outs, lses = zip(*forwards)
    dqs, dkvs = zip(*backwards)
    dks, dvs = zip(*dkvs)
    order_BS = torch.cat(positions_BL, dim=1).argsort(1)

    def whole(parts: Iterable[torch.Tensor]) -> torch.Tensor:
        joined_BS = torch.cat([_separate_samples(x, mask) for x in parts], dim=1)
        return joined_BS[torch.arange(len(joined_BS))[:, None], order_BS]

    results = Attention(
        whole(outs), whole(dqs), whole(dks), whole(dvs), whole(lse.mT for lse in lses).mT
    )
    return RingRun(results, Exchanges(forward_exchanges, backward_exchanges))


def _concatenate_samples(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return x.unflatten(0, (-1, mask.samples)).flatten(1, 2)


def _separate_samples(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    return x.unflatten(1, (mask.samples, -1)).flatten(0, 1)


def _on_every_rank(
    layout: Layout,
    kernel: HopKernel,
    scale: float,
    mask: Mask,
    body: Callable[[ring_loop.Ring], tuple],
    settings: dict,
) -> tuple[list[tuple], list[list[int]]]:
    """Run ``body`` in a thread per rank; return the results and the bytes sent, by rank.

    Raises the first failure that is not a consequence of another rank's.
    """
    size = layout.ring_size
    slots = [[Queue() for _ in range(2 * size)] for _ in range(size)]
    exchanges = [QueueExchange(rank, slots) if size > 1 else None for rank in range(size)]

    def run_rank(rank: int):
        try:
            ring = ring_loop.Ring(layout, rank, kernel, scale, exchanges[rank], mask, **settings)
            return body(ring)
        finally:
            if exchanges[rank]:
                exchanges[rank].close()

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run_rank, rank) for rank in range(size)]
    failures = [future.exception() for future in futures if future.exception()]
    if failures:
        own_failures = (failure for failure in failures if not isinstance(failure, LinkBroken))
        raise next(own_failures, failures[0])
    sent = [exchange.sent if exchange else [] for exchange in exchanges]
    return [future.result() for future in futures], sent
