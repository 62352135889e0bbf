"""Simulated CUDA devices of a ring's ranks in one process, with NCCL's messages between them.

A rank is a thread. Its host queues work on the stream of its device and goes on; when the work
runs follows from the durations that the test gives, in virtual nanoseconds. Misuse of events that
CUDA would punish, or let pass with a wrong time, raises.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

HOST_CALL = 100
"""Nanoseconds that the host takes to queue anything."""


class NotComplete(Exception):
    """An event was read that the device has not reached."""


class NeverRecorded(Exception):
    """An event was read that was never recorded."""


class OutOfOrder(Exception):
    """The end of an interval was recorded before its beginning."""


class ReusedUnread(Exception):
    """An event was recorded again before its time was read."""


@dataclass
class Device:
    """One rank's host and device.

    Attributes:
        clock_skew: what the host's clock shows at virtual time 0.
        now: virtual time at which the host is.
        busy_until: when all work queued so far is done.
        position: returns (direction, hop) of what the host queues.
        spent: nanoseconds by ("kernel" or "wait", direction, hop).
        recorded: number of events recorded.
        stream_waits, synchronizations: how often the stream waited for a message, and the host for
            the stream.
    """

    ring_rank: int = 0
    clock_skew: int = 0
    now: int = 0
    busy_until: int = 0
    position: Callable[[], tuple[int, int]] = lambda: (0, 0)
    spent: Counter = field(default_factory=Counter)
    events: list["Event"] = field(default_factory=list)
    recorded: int = 0
    stream_waits: int = 0
    synchronizations: int = 0

    def launch(self, duration: int) -> None:
        """Queue a kernel."""
        self.queue_call()
        self.busy_until += duration
        self.spent["kernel", *self.position()] += duration

    def wait_until(self, moment: int) -> None:
        """Queue a wait of the stream until ``moment``."""
        self.queue_call()
        self.stream_waits += 1
        self.spent["wait", *self.position()] += max(0, moment - self.busy_until)
        self.busy_until = max(self.busy_until, moment)

    def synchronize(self) -> None:
        """Let the host wait for the stream."""
        self.synchronizations += 1
        self.now = max(self.now, self.busy_until)

    def host_time(self) -> int:
        """Return what the host's clock shows."""
        return self.now + self.clock_skew

    def new_event(self) -> "Event":
        self.events.append(Event(self))
        return self.events[-1]

    def queue_call(self) -> None:
        """Queue something that takes the device no time."""
        self.now += HOST_CALL
        self.busy_until = max(self.busy_until, self.now)


@dataclass(eq=False)
class Event:
    """A stand-in for torch.cuda.Event with timing."""

    device: Device
    moment: int | None = None
    is_unread: bool = False

    def record(self) -> None:
        if self.is_unread:
            raise ReusedUnread
        self.device.queue_call()
        self.device.recorded += 1
        self.moment = self.device.busy_until
        self.is_unread = True

    def elapsed_time(self, end: "Event") -> float:
        for event in (self, end):
            if event.moment is None:
                raise NeverRecorded
            if event.moment > self.device.now:
                raise NotComplete
            event.is_unread = False
        if end.moment < self.moment:
            raise OutOfOrder
        return float(np.float32((end.moment - self.moment) / 1e6))


@dataclass
class P2POp:
    """A stand-in for torch.distributed.P2POp."""

    op: Callable
    tensor: torch.Tensor
    peer: int
    group: Any


@dataclass
class Network:
    """Messages between the devices, each on a path of its own.

    A message starts once its sender and its receiver have done all they had queued before they
    posted it, and takes ``duration``. Ring ranks are global ranks.
    """

    duration: int
    _posts: dict[tuple, Queue] = field(default_factory=lambda: defaultdict(Queue))
    _numbers: Counter = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    @property
    def device(self) -> Device:
        """The device of the calling thread's rank."""
        return self._local.device

    def on_every_rank(self, devices: list[Device], body: Callable[[Device], Any]) -> list[Any]:
        """Run ``body`` on each device in a thread of its own; return the results."""

        def run(device: Device) -> Any:
            self._local.device = device
            return body(device)

        with ThreadPoolExecutor(len(devices)) as threads:
            return list(threads.map(run, devices))

    def batch_isend_irecv(self, ops: list[P2POp]) -> list["Work"]:
        """Post the messages; return one work for the batch, as NCCL does."""
        device = self.device
        device.queue_call()
        own = device.ring_rank
        transfers = []
        for op in ops:
            is_send = op.op is dist.isend
            ends = (own, op.peer) if is_send else (op.peer, own)
            with self._lock:
                number = self._numbers[op.group, ends, is_send]
                self._numbers[op.group, ends, is_send] += 1
                mine = self._posts[op.group, ends, number, is_send]
                theirs = self._posts[op.group, ends, number, not is_send]
            mine.put((device.busy_until, op.tensor.clone() if is_send else None))
            transfers.append((device.busy_until, theirs, None if is_send else op.tensor))
        return [Work(self, transfers)]


@dataclass
class Work:
    network: Network
    transfers: list[tuple[int, Queue, torch.Tensor | None]]

    def wait(self) -> None:
        """Make the stream wait, not the host."""
        ends = []
        for posted, theirs, into in self.transfers:
            posted_there, message = theirs.get(timeout=60)
            ends.append(max(posted, posted_there) + self.network.duration)
            if into is not None:
                into.copy_(message)
        self.network.device.wait_until(max(ends))
