"""A ring in one process on one device: to each rank a thread, a stream for its hops and another for its messages.

What NCCL does between devices (docs/decisions/0017-messages-have-streams-of-their-own.md) copies do here within one. A
message starts when all is done that both ends had queued before they posted it, whatever they queue behind it. Waiting
for one lets a rank's stream wait, never the host. Threads meet when they post, as no network would ask of them: what
each queues on the device, and in which order, is the same.

Streams are those of torch.cuda, or what can take their place: nothing on a CPU, and what keeps account in tests.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Protocol, TypeVar

import torch

from megatron_ring.parallel.recv_buffers import RecvBufferPool

Result = TypeVar("Result")


class LinkBroken(Exception):
    """Another rank failed and will post no more."""


class Stream(Protocol):
    """As torch.cuda.Stream."""

    def record_event(self) -> Any:
        """The moment at which all that is queued here so far is done."""

    def wait_event(self, event: Any) -> None:
        """Let what is queued here from now on wait for that moment; the host goes on."""


class AtOnce:
    """The stream of a CPU, where what is queued is done before anything else can be."""

    def record_event(self) -> None:
        """There is nothing to wait for."""

    def wait_event(self, event: None) -> None:
        """Does not wait."""


@dataclass(frozen=True)
class Streams:
    """Of one rank. on: has this thread queue on a stream, while within."""

    hops: Stream
    messages: Stream
    on: Callable[[Stream], AbstractContextManager]

    @staticmethod
    def of_device(device: str) -> "Streams":
        """Messages of high priority, as on the links of a ring (megatron_ring/parallel/collectives.py)."""
        if device == "cpu":
            return Streams(AtOnce(), AtOnce(), lambda stream: contextlib.nullcontext())
        return Streams(torch.cuda.Stream(), torch.cuda.Stream(priority=-1), torch.cuda.stream)


@dataclass(frozen=True)
class Posted:
    """What a rank sends. ready: when it may be read; read: is given the moment at which that is over."""

    tensor: torch.Tensor
    ready: Any
    read: Queue = field(default_factory=Queue)


@dataclass
class Meeting:
    """Where ranks post: the n-th transfer that a rank starts meets the n-th of the others."""

    size: int
    posts: dict[tuple[int, int], Queue] = field(default_factory=dict)
    failed: threading.Event = field(default_factory=threading.Event)

    def post_to(self, ring_rank: int, number: int) -> Queue:
        """What the ``number``-th transfer brings to a rank."""
        return self.posts.setdefault(
            (ring_rank, number), Queue()
        )  # of two threads that do this one's is kept

    def take(self, queue: Queue) -> Any:
        """What another rank puts there, once it has."""
        while True:
            try:
                return queue.get(timeout=0.1)
            except Empty:
                if self.failed.is_set():
                    raise LinkBroken from None


@dataclass(frozen=True)
class StreamTransfer:
    sent: Posted
    received: torch.Tensor
    arrived: Any
    streams: Streams
    meeting: Meeting
    room: RecvBufferPool

    def wait(self) -> torch.Tensor:
        """What was sent to this rank. What is queued from now on may read it, and write to what this rank sent."""
        self.streams.hops.wait_event(self.arrived)
        self.streams.hops.wait_event(self.meeting.acquire(self.sent.read))
        self.room.release(self.sent.tensor)
        return self.received


@dataclass
class StreamExchange:
    """A rank's exchange (megatron_ring/context_parallel/ring.py). started: how many transfers so far."""

    ring_rank: int
    streams: Streams
    meeting: Meeting
    started: int = 0
    room: RecvBufferPool = field(default_factory=RecvBufferPool)

    def start(self, tensor: torch.Tensor, distance: int = 1) -> StreamTransfer:
        """Post, and let the stream of messages copy what is posted to this rank."""
        received, posted = self.room.acquire(tensor), self.streams.hops.record_event()
        number, receiver = self.started, (self.ring_rank + distance) % self.meeting.size
        self.started += 1
        sent = Posted(tensor, posted)
        self.meeting.post_to(receiver, number).put(sent)
        coming = self.meeting.acquire(self.meeting.post_to(self.ring_rank, number))
        arrived = self._copied(coming, received, posted)
        return StreamTransfer(sent, received, arrived, self.streams, self.meeting, self.room)

    def _copied(self, coming: Posted, received: torch.Tensor, posted: Any) -> Any:
        """Copy when its sender has it and this rank has room for it; the moment at which that is done."""
        self.streams.messages.wait_event(coming.ready)
        self.streams.messages.wait_event(posted)
        with self.streams.on(self.streams.messages):
            received.copy_(coming.tensor, non_blocking=True)
        arrived = self.streams.messages.record_event()
        coming.read.put(arrived)
        return arrived


def on_every_rank(
    streams: Sequence[Streams], body: Callable[[int, StreamExchange], Result]
) -> list[Result]:
    """``body`` of each rank, all at once, queued on the streams of their hops. The first failure is raised here."""
    meeting = Meeting(len(streams))

    def of_rank(ring_rank: int) -> Result:
        own = streams[ring_rank]
        try:
            with own.on(own.hops):
                return body(ring_rank, StreamExchange(ring_rank, own, meeting))
        except BaseException:
            meeting.failed.set()
            raise

    with ThreadPoolExecutor(len(streams)) as threads:
        futures = [threads.submit(of_rank, ring_rank) for ring_rank in range(len(streams))]
    failures = [error for future in futures if (error := future.exception())]
    if failures:
        raise next((error for error in failures if not isinstance(error, LinkBroken)), failures[0])
    return [future.result() for future in futures]
