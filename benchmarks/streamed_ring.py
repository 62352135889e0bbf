"""A ring in one process on one device: per rank a thread and streams for hops and messages.

Copies within the device take the place of NCCL's transfers between devices
(docs/decisions/0017-ring-messages-use-separate-high-priority-streams.md). A message starts once
everything is done that its sender and its receiver had queued before they posted it; what they
queue afterwards does not delay it. Waiting for a message blocks a rank's stream, never the host.
Threads wait for each other when they post, which a network would not require; what each of them
queues on the device, and in which order, is the same.

The streams are those of torch.cuda or substitutes: null streams on a CPU, recording ones in tests.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.emulated_ring import Attention
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.kernels.attention import HopKernel
from megatron_ring.parallel.message_buffers import RecvBufferPool
from megatron_ring.parallel.peers import Peers, peers_at_distance
from megatron_ring.parallel.progress import ProgressTracker

Result = TypeVar("Result")


class LinkBroken(Exception):
    """Another rank failed and will post no more messages."""


class Stream(Protocol):
    """The part of torch.cuda.Stream that is used here."""

    def record_event(self) -> Any:
        """Return an event that completes once all work queued so far is done."""

    def wait_event(self, event: Any) -> None:
        """Make work queued from now on wait for ``event``, without blocking the host."""


class NullStream:
    """The stream of a CPU, on which work is done as soon as it is queued."""

    def record_event(self) -> None:
        """Return None: there is nothing to wait for."""

    def wait_event(self, event: None) -> None:
        """Return at once."""


@dataclass(frozen=True)
class Streams:
    """The streams of one rank.

    Attributes:
        on: Context manager in which this thread queues its work on the given stream.
    """

    hops: Stream
    messages: Stream
    on: Callable[[Stream], AbstractContextManager]

    @staticmethod
    def of_device(device: str) -> "Streams":
        """Return new streams; messages have high priority, as in parallel/collectives.py."""
        if device == "cpu":
            return Streams(NullStream(), NullStream(), lambda stream: contextlib.nullcontext())
        return Streams(torch.cuda.Stream(), torch.cuda.Stream(priority=-1), torch.cuda.stream)


@dataclass(frozen=True)
class Posted:
    """A message that a rank sends.

    Attributes:
        ready: Event after which the tensor may be read.
        read: Receives the event after which the tensor is no longer read.
    """

    tensor: torch.Tensor
    ready: Any
    read: Queue = field(default_factory=Queue)


@dataclass
class Rendezvous:
    """Matches the n-th transfer that each rank starts with the n-th of the others."""

    size: int
    queues: dict[tuple[int, int], Queue] = field(default_factory=dict)
    failed: threading.Event = field(default_factory=threading.Event)

    def queue_of(self, receiver: int, number: int) -> Queue:
        """Return the queue through which ``receiver`` gets the message of its n-th transfer."""
        # setdefault is atomic: if two threads call it at once, both get the same queue.
        return self.queues.setdefault((receiver, number), Queue())

    def get(self, queue: Queue) -> Any:
        """Block until another rank puts an item; raise LinkBroken if one fails first."""
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
    rendezvous: Rendezvous
    buffers: RecvBufferPool

    def wait(self) -> torch.Tensor:
        """Return the received tensor.

        Work queued from now on may read it and may write to the tensor that was sent.
        """
        self.streams.hops.wait_event(self.arrived)
        self.streams.hops.wait_event(self.rendezvous.get(self.sent.read))
        self.buffers.release(self.sent.tensor)
        return self.received


@dataclass
class StreamExchange:
    """The ring exchange of one rank (megatron_ring/context_parallel/ring.py).

    Attributes:
        started: Number of transfers started so far.
    """

    ring_rank: int
    streams: Streams
    rendezvous: Rendezvous
    started: int = 0
    buffers: RecvBufferPool = field(default_factory=RecvBufferPool)

    def start(self, tensor: torch.Tensor, distance: int = 1) -> StreamTransfer:
        """Post ``tensor`` and queue the copy of the message to this rank."""
        peers = peers_at_distance(self.ring_rank, self.rendezvous.size, distance)
        return self.start_with(peers, tensor, self.buffers.acquire(tensor))

    def start_with(
        self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor
    ) -> StreamTransfer:
        """Post ``tensor`` to the receiver and queue the copy of the message that comes."""
        posted = self.streams.hops.record_event()
        number = self.started
        self.started += 1
        sent = Posted(tensor, posted)
        self.rendezvous.queue_of(peers.receiver, number).put(sent)
        incoming = self.rendezvous.get(self.rendezvous.queue_of(self.ring_rank, number))
        arrived = self._queue_copy(incoming, received, posted)
        return StreamTransfer(sent, received, arrived, self.streams, self.rendezvous, self.buffers)

    def _queue_copy(self, incoming: Posted, received: torch.Tensor, posted: Any) -> Any:
        """Queue the copy on the message stream and return the event of its end.

        It waits for the sender to have the tensor and for this rank to have the buffer.
        """
        self.streams.messages.wait_event(incoming.ready)
        self.streams.messages.wait_event(posted)
        with self.streams.on(self.streams.messages):
            received.copy_(incoming.tensor, non_blocking=True)
        arrived = self.streams.messages.record_event()
        incoming.read.put(arrived)
        return arrived


@dataclass(frozen=True)
class RecordedExchange:
    """An exchange that records the rank's progress, as parallel/collectives.py does.

    It records as many events as with NCCL, where a transfer has one work for the message that
    arrives and one for that which leaves.
    """

    exchange: StreamExchange
    ranks: int
    progress: ProgressTracker

    def start(self, tensor: torch.Tensor, distance: int = 1) -> "RecordedTransfer":
        peers = peers_at_distance(self.exchange.ring_rank, self.ranks, distance)
        return self._recorded(peers, tensor, lambda: self.exchange.start(tensor, distance))

    def start_with(
        self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor
    ) -> "RecordedTransfer":
        start = functools.partial(self.exchange.start_with, peers, tensor, received)
        return self._recorded(peers, tensor, start)

    def _recorded(
        self, peers: Peers, tensor: torch.Tensor, start: Callable[[], StreamTransfer]
    ) -> "RecordedTransfer":
        send_row = self.progress.record_send(tensor.nbytes, peers.receiver)
        with self.progress.posting_to(peers.receiver):
            transfer = start()
        return RecordedTransfer(transfer, send_row, peers.sender, peers.receiver, self.progress)


@dataclass(frozen=True)
class RecordedTransfer:
    transfer: StreamTransfer
    send_row: int
    sender: int
    receiver: int
    progress: ProgressTracker

    def wait(self) -> torch.Tensor:
        with self.progress.waiting_for(self.sender):
            received = self.transfer.wait()
        with self.progress.waiting_for(self.receiver, follows_wait=True):
            pass
        self.progress.record_receive(self.send_row, self.sender)
        return received


def on_every_rank(
    streams: Sequence[Streams], body: Callable[[int, StreamExchange], Result]
) -> list[Result]:
    """Run ``body`` as every rank at once, in threads that queue on the stream of their hops.

    Returns the results by rank. Raises the first failure that is not a consequence of another.
    """
    rendezvous = Rendezvous(len(streams))

    def run_rank(ring_rank: int) -> Result:
        local = streams[ring_rank]
        try:
            with local.on(local.hops):
                return body(ring_rank, StreamExchange(ring_rank, local, rendezvous))
        except BaseException:
            rendezvous.failed.set()
            raise

    with ThreadPoolExecutor(len(streams)) as threads:
        futures = [threads.submit(run_rank, ring_rank) for ring_rank in range(len(streams))]
    failures = [error for future in futures if (error := future.exception())]
    if failures:
        causes = [error for error in failures if not isinstance(error, LinkBroken)]
        raise (causes or failures)[0]
    return [future.result() for future in futures]


def attention(
    inputs: Sequence[torch.Tensor],
    layout: Layout,
    kernel: HopKernel,
    mask: Mask = CAUSAL,
    **settings: Any,
) -> Attention:
    """Compute attention of whole sequences with ``ring.forward`` and ``ring.backward`` themselves.

    Unlike ``emulated_ring.attention`` this passes kernels what training passes them: half of the
    heads on a rank's own keys, received copies, and queries or keys that travel.

    Args:
        inputs: q, k, v and the gradient of the output; their dtype is that of the results. If the
            mask has several samples, those of the batch are laid end to end, as in the model.
        settings: More fields of the Ring.
    """
    device = inputs[0].device
    positions = [layout.positions(rank).to(device) for rank in range(layout.ring_size)]
    scale = inputs[0].shape[-1] ** -0.5

    def run_rank(rank: int, exchange: StreamExchange) -> tuple[torch.Tensor, ...]:
        q, k, v, dout = (
            x[:, positions[rank]].unflatten(0, (-1, mask.samples)).flatten(1, 2) for x in inputs
        )
        kv = torch.stack([k, v])
        exchange = exchange if layout.ring_size > 1 else None
        ring = ring_loop.Ring(layout, rank, kernel, scale, exchange, mask, **settings)
        out, lse = ring_loop.forward(q, kv, ring)
        dq, dkv = ring_loop.backward(dout, None, q, kv, out, lse, ring)
        return out, dq, *dkv

    # Streams read tensors that others have written, so the device finishes before and after.
    streams = [Streams.of_device(device.type) for _ in positions]
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    of_ranks = on_every_rank(streams, run_rank)
    synchronize()
    to_sequence_order = torch.cat(positions).argsort()
    return Attention(
        *(
            torch.cat([x.unflatten(1, (mask.samples, -1)).flatten(0, 1) for x in shards], 1)[
                :, to_sequence_order
            ].to(inputs[0].dtype)
            for shards in zip(*of_ranks)
        )
    )
