"""How fast is each link of the rings? A message of the run's own hop goes around, timed at both ends of every link.

In a hop each process sends and receives at once, so one slow link delays two processes. A link is as fast as the
faster of its two ends says: only a link that is slow itself was slow for both.
"""

import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import Process
from megatron_ring.plan.messages import ring_tensors
from megatron_ring.preflight.reachability import ring_exchange
from megatron_ring.settings.setup import Setup

_LARGEST_MESSAGE = 64 << 20
# As many as take a slow network some two seconds; the shorter a message, the more does it need to pass undisturbed.
_BYTES_PASSED, _FEWEST_PASSES, _MOST_PASSES = 256 << 20, 5, 50
# Of its kind's median; a ring is as fast as its slowest link.
_SLOW = 0.5


class Link(NamedTuple):
    """A hop's way from one process to the next in its ring."""

    sender: Process
    receiver: Process
    bytes_per_second: float

    @property
    def within_host(self) -> bool:
        return self.sender.host == self.receiver.host

    def __str__(self) -> str:
        ranks = f"{self.sender.global_rank} -> {self.receiver.global_rank}"
        return f"{ranks} ({self.sender.host} -> {self.receiver.host}) {megabytes(self.bytes_per_second)}"


def measure_links(
    setup: Setup, groups: ProcessGroups, processes: list[Process], consensus: Consensus
) -> list[Link]:
    """Every link of every ring, on every rank; none where rings are of one. Blocks until all have measured."""
    exchange = ring_exchange(groups)
    if exchange is None:
        return []
    message = torch.zeros(message_bytes(setup), dtype=torch.uint8, device=setup.device)
    seconds = consensus.gather(lambda: _seconds(exchange, message, consensus))
    return [
        Link(
            processes[sender],
            processes[receiver],
            message.nbytes / min(seconds[sender], seconds[receiver]),
        )
        for ring in setup.grid.members("ring")
        for sender, receiver in zip(ring, ring[1:] + ring[:1])
    ]


def message_bytes(setup: Setup) -> int:
    """Of K and V in one hop of this run, but at most 64 MiB, which a slow network passes in half a second."""
    _, kv_2BLgD = ring_tensors(setup.config, setup.grid, setup.layout, setup.precision.dtype)
    return min(kv_2BLgD.nbytes, _LARGEST_MESSAGE)


def slow(links: list[Link]) -> list[Link]:
    """Links that take more than twice as long as the median of their kind: within a host, or between two."""
    medians = {
        link.within_host: median([each for each in links if each.within_host == link.within_host])
        for link in links
    }
    return [link for link in links if link.bytes_per_second < _SLOW * medians[link.within_host]]


def megabytes(bytes_per_second: float) -> str:
    """In a second, with two digits at least."""
    rate = bytes_per_second / 1e6
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def median(links: list[Link]) -> float:
    """Bytes per second."""
    return statistics.median(link.bytes_per_second for link in links)


def _seconds(exchange: RingExchange, message: torch.Tensor, consensus: Consensus) -> float:
    """The fastest of many passes that all ranks begin together: the first warms up, and others may be disturbed."""
    seconds = []
    for _ in range(max(_FEWEST_PASSES, min(_MOST_PASSES, _BYTES_PASSED // message.nbytes))):
        dist.barrier(group=consensus.group)
        began = time.perf_counter()
        exchange.start(message).wait()
        if message.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
