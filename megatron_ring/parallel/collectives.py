"""Process groups along the grid's axes, built once and passed on, and the exchange of a ring.

A ring has two communicators. Rank r sends on number r % 2, so that what a rank sends to its
neighbour and what it receives do not queue behind each other, and neighbours post in an order that
cannot deadlock. Where both directions use the same number, as at the link that closes a ring of odd
size or in many direct exchanges (peers.py), a rank posts them as one batch (docs/decisions/0003).

Within a machine, with gloo, the communicators carry only tickets for messages (same_machine.py).
On CUDA each has a stream of its own, on which a message waits for what was posted before it and for
nothing after it (docs/decisions/0017-ring-messages-use-separate-high-priority-streams.md).
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.message_buffers import RecvBufferPool, storage_order_view
from megatron_ring.parallel.peers import Peers, peers_at_distance
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.parallel.same_machine import (
    PeerMemoryReader,
    ReadFuture,
    peer_memory_reader,
    probe_shared_memory,
    send_ticket,
    wait,
)

# The watchdog reports a stall after --ring-timeout with its cause. torch's own timeout reports no
# cause and must expire later.
_SECONDS_FOR_THE_WATCHDOG = 60
_LONGEST_SUSPENSION = timedelta(days=30)

RingLinks = tuple[dist.ProcessGroup, dist.ProcessGroup]


@dataclass(frozen=True)
class RingTransfer:
    """One exchange in flight: a tensor being sent to one rank, another received from one.

    Attributes:
        works: (global rank of the peer, operation) pairs to wait for.
        sent: held until the transfer ends, because gloo or the receiver reads it in the background.
        sender: global rank from which ``received`` comes.
        send_row: the transfer's identity in the log of ``progress``.
        timeout: of each wait; None for the process group's own.
    """

    works: list[tuple[int, dist.Work | ReadFuture]]
    sent: torch.Tensor
    received: torch.Tensor
    sender: int
    send_row: int
    progress: ProgressTracker
    buffers: RecvBufferPool
    timeout: timedelta | None

    def wait(self) -> torch.Tensor:
        """Return the received tensor; the sent one may be written to from now on.

        On CUDA the stream waits, not the host.
        """
        for number, (peer, work) in enumerate(self.works):
            with self.progress.waiting_for(peer, follows_wait=number > 0):
                wait(work, self.timeout)
        self.progress.record_receive(self.send_row, self.sender)
        self.buffers.release(self.sent)
        return self.received


class RingRank(NamedTuple):
    """This process's rank in its ring, and the ring's two communicators; None for one rank."""

    rank: int
    size: int
    links: RingLinks | None

    @staticmethod
    def of(links: RingLinks | None) -> "RingRank":
        """Return the rank of this process in the ring that ``links`` connect."""
        if links is None:
            return RingRank(0, 1, None)
        return RingRank(dist.get_rank(links[0]), dist.get_world_size(links[0]), links)

    def exchange(self) -> "RingExchange":
        """Return an exchange for messages of a few KB, which do not pay for a ticket."""
        members = tuple(dist.get_process_group_ranks(self.links[0]))
        return RingExchange(members, self.links, self.rank)


@dataclass(frozen=True)
class RingExchange:
    """Sends tensors around a ring of at least two ranks.

    Attributes:
        members: the ring's global ranks in ring order.
        links: its two communicators.
        ring_rank: this process's position.
        progress: records which rank this process waits for.
        buffers: where messages are received.
        peer_reader: reads messages in the memory of other members; all members have one, or none.
        timeout: of each wait; None for the process group's own.
    """

    members: tuple[int, ...]
    links: RingLinks
    ring_rank: int
    progress: ProgressTracker = field(default_factory=ProgressTracker)
    buffers: RecvBufferPool = field(default_factory=RecvBufferPool)
    peer_reader: PeerMemoryReader | None = None
    timeout: timedelta | None = None

    @staticmethod
    def over(links: RingLinks, progress: ProgressTracker | None = None) -> "RingExchange":
        """Create the exchange of this process in the ring that ``links`` connect."""
        return RingExchange(
            members=tuple(dist.get_process_group_ranks(links[0])),
            links=links,
            ring_rank=dist.get_rank(links[0]),
            progress=progress or ProgressTracker(),
            peer_reader=peer_memory_reader(links[0]),
            timeout=_LONGEST_SUSPENSION if links[0].group_name in _watched_links else None,
        )

    @property
    def is_slow(self) -> bool:
        """Whether a message takes so much longer than a copy in memory that overlap pays."""
        return self.peer_reader is None

    def start(self, tensor: torch.Tensor, distance: int = 1) -> RingTransfer:
        """Send a dense ``tensor`` on by ``distance`` ranks and receive its like; does not block."""
        peers = peers_at_distance(self.ring_rank, len(self.members), distance)
        return self.start_with(peers, tensor, self.buffers.acquire(tensor))

    def start_with(
        self, peers: Peers, tensor: torch.Tensor, received: torch.Tensor
    ) -> RingTransfer:
        """Send a dense ``tensor`` and receive into another, of any form; does not block.

        What has no elements is not sent: sender and receiver both know it.
        """
        receiver, sender = peers
        send_row = self.progress.record_send(tensor.nbytes, self.members[receiver])
        reads_peers = self.peer_reader is not None and tensor.device.type == "cpu"
        post = self._post_ticket if reads_peers else self._post_messages
        works = post(tensor, receiver, received, sender)
        return RingTransfer(
            works=works,
            sent=tensor,
            received=received,
            sender=self.members[sender],
            send_row=send_row,
            progress=self.progress,
            buffers=self.buffers,
            timeout=self.timeout,
        )

    def _post_ticket(
        self, tensor: torch.Tensor, receiver: int, received: torch.Tensor, sender: int
    ) -> list[tuple[int, dist.Work | ReadFuture]]:
        own_link = self.links[self.ring_rank % 2]
        link_of_sender = self.links[sender % 2]
        receiver = self.members[receiver]
        sender = self.members[sender]
        ticket_works = ()
        if tensor.numel():
            with self.progress.posting_to(receiver):  # as in _post
                ticket_works = send_ticket(tensor, receiver, own_link)
        works = [(receiver, work) for work in ticket_works]
        if received.numel():
            with self.progress.posting_to(sender):
                future = self.peer_reader.start_read(received, sender, link_of_sender, self.timeout)
            works.insert(0, (sender, future))
        return works

    def _post_messages(
        self, tensor: torch.Tensor, receiver: int, received: torch.Tensor, sender: int
    ) -> list[tuple[int, dist.Work]]:
        send = storage_order_view(tensor), self.members[receiver]
        receive = storage_order_view(received), self.members[sender]
        own_number = self.ring_rank % 2
        works = []
        for number, link in enumerate(self.links):
            ops = []
            if own_number == number and tensor.numel():
                ops.append(dist.P2POp(dist.isend, *send, link))
            if sender % 2 == number and received.numel():
                ops.append(dist.P2POp(dist.irecv, *receive, link))
            if ops:
                works += self._post(ops)
        return works

    def _post(self, ops: list[dist.P2POp]) -> list[tuple[int, dist.Work]]:
        """Start the operations; does not block.

        If the other rank has died, gloo raises either here or in the wait, so both are recorded as
        waiting for it.
        """
        with self.progress.posting_to(ops[0].peer):
            works = dist.batch_isend_irecv(ops)
        # NCCL returns one work for the whole batch.
        return [(op.peer, work) for op, work in zip(ops, works)]


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this process; None for a group of one.

    Attributes:
        data_context: ranks that share parameters and differ in tokens, D x C; losses and counts are
            summed over it.
        ring_links: the two communicators of this process's ring.
        ulysses: ranks that exchange heads for tokens with this one.
        tensor: ranks that split every layer with this one.
        model: ranks that hold one copy of all parameters between them, P x T.
    """

    data_context: dist.ProcessGroup | None = None
    ring_links: RingLinks | None = None
    ulysses: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    model: dist.ProcessGroup | None = None

    @staticmethod
    def build(grid: Grid, global_rank: int, ring_timeout: int = 0) -> "ProcessGroups":
        """Build all groups of the grid. Collective over all processes; blocks until all call it.

        Args:
            ring_timeout: seconds after which a watchdog ends a wait in the ring. torch's own
                timeout, NCCL's watchdog included, is set a minute later. 0: no watchdog, and
                torch's default timeout.
        """
        timeout = None
        if ring_timeout:
            timeout = timedelta(seconds=ring_timeout + _SECONDS_FOR_THE_WATCHDOG)
        return ProcessGroups(
            data_context=_own_group(grid.members("data", "ring", "ulysses"), global_rank),
            ring_links=_ring_links(grid, global_rank, timeout),
            ulysses=_own_group(grid.members("ulysses"), global_rank),
            tensor=_own_group(grid.members("tensor"), global_rank),
            model=_own_group(grid.members("pipe", "tensor"), global_rank),
        )

    @property
    def data_context_rank_and_size(self) -> tuple[int, int]:
        """(rank, size) of this process in data x context, the ranks that share its parameters."""
        group = self.data_context
        return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce ``tensor`` over data x context, in place, and return it; blocks."""
        if self.data_context is not None:
            dist.all_reduce(tensor, group=self.data_context)
        return tensor


_watched_links: set[str] = set()  # group names of links whose waits a watchdog ends


def leave_link_timeouts_to_watchdog(links: RingLinks) -> None:
    """Leave the timeout of waits on these links to the watchdog, which must run from now on.

    gloo counts time in which its process was suspended as waiting time, and the watchdog does not.
    NCCL's timeout stays: there the host does not wait for the device, so it is the only one.
    """
    if "nccl" not in dist.get_backend_config(links[0]):
        _watched_links.update(link.group_name for link in links)


def _ring_links(grid: Grid, global_rank: int, timeout: timedelta | None) -> RingLinks | None:
    if grid.ring == 1:
        return None
    links = tuple(
        _own_group(grid.members("ring"), global_rank, timeout, _link_options(timeout))
        for _ in range(2)
    )
    for link in links:
        # NCCL creates its communicator in the first call, which all ranks of the group must join;
        # in a ring of odd size rank 0 has no transfer on the second link.
        dist.barrier(group=link)
    if "nccl" not in dist.get_backend_config():  # NCCL has its own transports within a machine
        probe_shared_memory(links[0])
    return links


def _link_options(timeout: timedelta | None) -> "dist.ProcessGroupNCCL.Options | None":
    """Return options for one link, to which torch will write; None without NCCL.

    NCCL copies with kernels. On a stream of high priority they get the next free multiprocessors,
    before those blocks of an attention kernel that have yet to start.
    """
    if "nccl" not in dist.get_backend_config():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout  # torch uses the group's, and warns if the two differ
    return options


def _own_group(
    groups: list[list[int]],
    global_rank: int,
    timeout: timedelta | None = None,
    # A string, because torch built without NCCL does not have this class.
    options: "dist.ProcessGroupNCCL.Options | None" = None,
) -> dist.ProcessGroup | None:
    if len(groups[0]) == 1:
        return None
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout, pg_options=options)
    return own
