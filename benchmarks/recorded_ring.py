"""Attention layers in a ring that records what --straggler-threshold and --profile-ring do.

All ranks are threads of this process, with copies in the place of messages (streamed_ring.py), or
each is a process of torchrun. A stopwatch can time every pass of the ring independently of what is
recorded.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.common import DTYPES, random_inputs
from benchmarks.streamed_ring import RecordedExchange, StreamExchange, Streams, on_every_rank
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.hop_cost import with_work_count
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.ring_hop import Exchange
from megatron_ring.kernels.attention import KERNELS, HopKernel, choose
from megatron_ring.monitoring.ring_profile.hop_statistics import sum_log
from megatron_ring.parallel.device_clock import DeviceClock, TimedEvent, cuda_event
from megatron_ring.parallel.progress import Direction, ProgressTracker
from megatron_ring.parallel.ring_log import WORK_EVENTS, Event

if TYPE_CHECKING:
    from megatron_ring.parallel.collectives import RingLinks

# What each mode records; None: nothing.
MODES = {"off": None, "stragglers": WORK_EVENTS, "profile": frozenset(Event)}

_ROWS_PER_HOP = 24


# ---- one rank ----


@dataclass
class Stopwatch:
    """Times passes of the ring independently of the profile.

    Attributes:
        new_event: Creates an event with timing; None: the host's clock is read.
    """

    new_event: Callable[[], TimedEvent] | None
    _host_seconds: float = 0.0
    _events: list[tuple[TimedEvent, TimedEvent]] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        if self.new_event is None:
            began = time.perf_counter()
            yield
            self._host_seconds += time.perf_counter() - began
        else:
            begin, end = self.new_event(), self.new_event()
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))

    def seconds(self) -> float:
        """Return the sum of all spans; the device must have been synchronised."""
        return self._host_seconds + sum(b.elapsed_time(e) for b, e in self._events) / 1e3


@dataclass(frozen=True)
class Rank:
    """One rank of the ring: its tensors, and a progress tracker for each mode."""

    ring_rank: int
    q: torch.Tensor
    kv: torch.Tensor
    dout: torch.Tensor
    trackers: dict[str, ProgressTracker]

    def run_layers(self, ring: "RecordedRing", mode: str, exchange: Exchange, watch: Any) -> None:
        """Queue a step: all layers forward and backward, each pass within ``watch()``."""
        tracker = self.trackers[mode]
        loop = ring_loop.Ring(
            layout=ring.layout,
            ring_rank=self.ring_rank,
            kernel=with_work_count(ring.kernel, tracker),
            scale=self.q.shape[-1] ** -0.5,
            exchange=exchange,
            on_hop=tracker.begin_hop,
        )
        for layer in range(ring.layers):
            with watch(), tracker.in_ring(layer, Direction.FORWARD):
                out, lse = ring_loop.forward(self.q, self.kv, loop)
            with watch(), tracker.in_ring(layer, Direction.BACKWARD):
                ring_loop.backward(self.dout, None, self.q, self.kv, out, lse, loop)


class Reading(NamedTuple):
    """What one rank's profile gives for a step, and what the stopwatch measured, in seconds.

    rows: of the log. missed: rows that did not fit.
    """

    compute: float
    wait: float
    ring: float
    rows: int
    missed: int


def make_trackers(
    log_rows: int, new_event: Callable[[], TimedEvent] | None
) -> dict[str, ProgressTracker]:
    """Return a rank's tracker for each mode, as training builds them (ring_profile/monitor.py)."""
    trackers = {"off": ProgressTracker()}
    for mode, logged in MODES.items():
        if logged is not None and new_event is not None:
            trackers[mode] = ProgressTracker.with_work(log_rows, DeviceClock(logged, new_event))
        elif logged is not None:
            trackers[mode] = ProgressTracker.with_work(log_rows if mode == "profile" else 0)
    return trackers


# ---- all ranks ----


@dataclass(frozen=True)
class RecordedRing:
    """The ranks of this process, and what they run.

    Attributes:
        ranks: All ranks of the ring, or this process's one.
        links: Of the processes of torchrun; None where the ranks are threads.
        new_event: Creates an event with timing; None on a CPU.
        synchronize: Blocks until the device is done.
    """

    layout: Layout
    layers: int
    kernel: HopKernel
    ranks: list[Rank]
    streams: list[Streams]
    links: "RingLinks | None"
    new_event: Callable[[], TimedEvent] | None
    synchronize: Callable[[], None]

    @staticmethod
    def build(options: argparse.Namespace, links: "RingLinks | None") -> "RecordedRing":
        on_gpu = options.device == "cuda"
        dtype = DTYPES[options.dtype]
        kernel = choose(options.kernel, options.device, dtype, options.head_dim).name
        layout = Layout("striped", options.ranks * options.tokens, options.ranks)
        own_ranks = [dist.get_rank()] if links else range(options.ranks)
        new_event = cuda_event if on_gpu else None
        heads = options.heads, options.kv_heads, options.head_dim
        q, k, v, dout = random_inputs(options.tokens, *heads, options.device, dtype)
        log_rows = _ROWS_PER_HOP * 2 * options.layers * options.ranks
        return RecordedRing(
            layout=layout,
            layers=options.layers,
            kernel=KERNELS[kernel],
            ranks=[
                Rank(rank, q, torch.stack([k, v]), dout, make_trackers(log_rows, new_event))
                for rank in own_ranks
            ],
            streams=[] if links else [Streams.of_device(options.device) for _ in own_ranks],
            links=links,
            new_event=new_event,
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        )

    def step(self, mode: str) -> float:
        """Run a step and read what it recorded; return its seconds, of the slowest process."""
        self._barrier()
        began = time.perf_counter()
        self._run(mode, [contextlib.nullcontext] * len(self.ranks))
        for rank in self.ranks:
            sum_log(rank.trackers[mode].end_step(), self.layout.ring_size)
        seconds = time.perf_counter() - began
        return max(self.gathered(seconds))

    def timed_step(self) -> list[Reading]:
        """Run a profiled step with a stopwatch around every pass; return a reading of each rank."""
        watches = [Stopwatch(self.new_event) for _ in self.ranks]
        self._barrier()
        self._run("profile", [watch.span for watch in watches])
        readings = []
        for rank, watch in zip(self.ranks, watches):
            tracker = rank.trackers["profile"]
            rows = tracker.end_step()
            sums = sum_log(rows, self.layout.ring_size)
            readings.append(
                Reading(
                    compute=float(sums.compute_2R.sum()),
                    wait=float(sums.wait_2R.sum()),
                    ring=watch.seconds(),
                    rows=len(rows),
                    missed=tracker.log.missed,
                )
            )
        return readings

    def _run(self, mode: str, watches: list[Any]) -> None:
        """Run a step on the ranks of this process and synchronise, as a training step does."""

        def on_thread(number: int, exchange: StreamExchange) -> None:
            rank = self.ranks[number]
            tracker = rank.trackers[mode]
            tracker.begin_step()
            recorded = RecordedExchange(exchange, len(self.ranks), tracker)
            rank.run_layers(self, mode, recorded, watches[number])

        if self.links is None:
            on_every_rank(self.streams, on_thread)
        else:
            from megatron_ring.parallel.collectives import RingExchange

            [rank] = self.ranks
            tracker = rank.trackers[mode]
            tracker.begin_step()
            exchange = RingExchange.over(self.links, tracker)
            rank.run_layers(self, mode, exchange, watches[0])
        self.synchronize()

    def _barrier(self) -> None:
        if self.links:
            dist.barrier()
        self.synchronize()

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes."""
        if not self.links:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values
