"""Measures the bandwidth of each ring link with a message of the size the run sends in a hop.

In a hop each process sends and receives at once, so one slow link delays the two processes at its
ends. Every message is timed at both ends of its link, and the shorter time counts: only a link that
is slow itself is slow for both.
"""

import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.process_id import ProcessId
from megatron_ring.plan.communication import ring_tensors
from megatron_ring.preflight.reachability import ring_exchange
from megatron_ring.settings.run_settings import RunSettings

_LARGEST_MESSAGE = 64 << 20

# About two seconds on a slow network. Short messages need more passes to get an undisturbed one.
_BYTES_TO_SEND = 256 << 20
_MIN_PASSES = 5
_MAX_PASSES = 50

# Below this share of the median of its kind a link is slow. A ring is as fast as its slowest link.
_SLOW_SHARE = 0.5


class Link(NamedTuple):
    """The connection from one process to the next in its ring."""

    sender: ProcessId
    receiver: ProcessId
    bytes_per_second: float

    @property
    def within_host(self) -> bool:
        return self.sender.host == self.receiver.host

    def __str__(self) -> str:
        ranks = f"{self.sender.global_rank} -> {self.receiver.global_rank}"
        hosts = f"{self.sender.host} -> {self.receiver.host}"
        return f"{ranks} ({hosts}) {megabytes(self.bytes_per_second)}"


def measure_links(
    setup: RunSettings, groups: ProcessGroups, processes: list[ProcessId], consensus: Consensus
) -> list[Link]:
    """Measure every link of every ring and return all of them on every rank.

    Returns an empty list where rings have one rank. Blocks until all ranks have measured.
    """
    exchange = ring_exchange(groups)
    if exchange is None:
        return []
    message = torch.zeros(message_bytes(setup), dtype=torch.uint8, device=setup.device)
    seconds = consensus.gather(lambda: _fastest_pass(exchange, message, consensus))
    links = []
    for ring in setup.grid.members("ring"):
        for sender, receiver in zip(ring, ring[1:] + ring[:1]):
            rate = message.nbytes / min(seconds[sender], seconds[receiver])
            links.append(Link(processes[sender], processes[receiver], rate))
    return links


def message_bytes(setup: RunSettings) -> int:
    """Return the bytes of K and V in one hop, but at most 64 MiB.

    A slow network sends that many in half a second.
    """
    _, kv_2BLgD = ring_tensors(setup.config, setup.grid, setup.layout, setup.precision.dtype)
    return min(kv_2BLgD.nbytes, _LARGEST_MESSAGE)


def slow_links(links: list[Link]) -> list[Link]:
    """Return the links with less than half of the median bandwidth of their kind.

    Links within a host and links between hosts are two kinds.
    """
    limits = {}
    for within_host in (True, False):
        same_kind = [link for link in links if link.within_host == within_host]
        if same_kind:
            limits[within_host] = _SLOW_SHARE * median(same_kind)
    return [link for link in links if link.bytes_per_second < limits[link.within_host]]


def megabytes(bytes_per_second: float) -> str:
    """Format a bandwidth in MB/s with at least two digits."""
    rate = bytes_per_second / 1e6
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def median(links: list[Link]) -> float:
    """Return the median bandwidth in bytes per second."""
    return statistics.median(link.bytes_per_second for link in links)


def _fastest_pass(exchange: RingExchange, message: torch.Tensor, consensus: Consensus) -> float:
    """Return the seconds of the fastest of many passes that all ranks start together.

    The first one warms up, and others may be disturbed.
    """
    passes = max(_MIN_PASSES, min(_MAX_PASSES, _BYTES_TO_SEND // message.nbytes))
    seconds = []
    for _ in range(passes):
        dist.barrier(group=consensus.group)
        began = time.perf_counter()
        exchange.start(message).wait()
        if message.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
