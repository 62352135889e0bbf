"""Process groups along the grid's axes, built once and passed on, and the ring's exchange. Talks torch.distributed.

A ring has two communicators. What rank r sends goes through number r % 2, so that what a rank sends to its neighbour
and what it receives do not queue behind each other, and neighbours post in an order that cannot lock. (Where both ways
share a number, as at the link that closes a ring of odd size, a rank posts them as one batch.)

Within a machine, where gloo talks, what goes through them are tickets for messages (same_machine.py).
On CUDA each has a stream of its own, on which a message waits for what was posted before it and for nothing after
(docs/decisions/0017-messages-have-streams-of-their-own.md).
"""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.messages import in_memory
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.parallel.recv_buffers import RecvBufferPool
from megatron_ring.parallel.same_machine import (
    Fetched,
    PeerMemoryReader,
    probe_shared_memory,
    reader_within,
    send_ticket,
    wait,
)

# The watchdog names a stall at --ring-timeout; torch's own limit, which names nothing, must not come before it.
_SECONDS_FOR_THE_WATCHDOG = 60
_LONGEST_SUSPENSION = timedelta(days=30)


@dataclass(frozen=True)
class RingTransfer:
    """A tensor on its way around the ring, and its like on the way here."""

    works: list[tuple[int, dist.Work | Fetched]]  # each with the global rank at its other end
    sent: (
        torch.Tensor
    )  # held until the transfer is over: gloo, or who receives it, reads it in the background
    received: torch.Tensor
    sender: int  # of what is received, a global rank
    sent_at: int  # as place.sends tells
    place: ProgressTracker
    room: RecvBufferPool
    limit: timedelta | None  # of each wait, as RingExchange has it

    def wait(self) -> torch.Tensor:
        """What was sent to this rank; what it sent may be written to now. On CUDA the stream waits, not the host."""
        for peer, work in self.works:
            with self.place.waiting_for(peer):
                wait(work, self.limit)
        self.place.received(self.sent_at, self.sender)
        self.room.release(self.sent)
        return self.received


@dataclass(frozen=True)
class RingExchange:
    """Passing a tensor on around a ring of at least two ranks.

    members: the ring's global ranks in ring order; links: its two communicators; ring_rank: this process's position.
    place: where it is noted for whom this process waits. room: where messages arrive. fetcher: what reads them in the
    memory of other members; all members have one, or none has.
    limit: of a wait; None is torch's own.
    """

    members: tuple[int, ...]
    links: tuple[dist.ProcessGroup, dist.ProcessGroup]
    ring_rank: int
    place: ProgressTracker = field(default_factory=ProgressTracker)
    room: RecvBufferPool = field(default_factory=RecvBufferPool)
    fetcher: PeerMemoryReader | None = None
    limit: timedelta | None = None

    @staticmethod
    def over(
        links: tuple[dist.ProcessGroup, dist.ProcessGroup], place: ProgressTracker | None = None
    ) -> "RingExchange":
        """This process's, in the ring whose ``links`` these are."""
        members = tuple(dist.get_process_group_ranks(links[0]))
        rank, fetcher = dist.get_rank(links[0]), reader_within(links[0])
        limit = _LONGEST_SUSPENSION if links[0].group_name in _unlimited else None
        return RingExchange(
            members, links, rank, place or ProgressTracker(), fetcher=fetcher, limit=limit
        )

    @property
    def is_slow(self) -> bool:
        """Whether a message takes so much longer than to copy it in memory that it pays to compute meanwhile."""
        return self.fetcher is None

    def start(self, tensor: torch.Tensor, distance: int = 1) -> RingTransfer:
        """Send ``tensor`` (dense) ``distance`` ranks on and receive its like from as far back; does not block."""
        size = len(self.members)
        sender, receiver = (self.ring_rank - distance) % size, (self.ring_rank + distance) % size
        received, sent_at = (
            self.room.acquire(tensor),
            self.place.sends(tensor.nbytes, self.members[receiver]),
        )
        within_the_machine = self.fetcher is not None and tensor.device.type == "cpu"
        way = self._by_ticket if within_the_machine else self._over_the_network
        works = way(tensor, receiver, received, sender)
        peer = self.members[sender]
        return RingTransfer(
            works, tensor, received, peer, sent_at, self.place, self.room, self.limit
        )

    def _by_ticket(
        self, tensor: torch.Tensor, receiver: int, received: torch.Tensor, sender: int
    ) -> list[tuple[int, dist.Work | Fetched]]:
        own_link, link_of_sender = (self.links[rank % 2] for rank in (self.ring_rank, sender))
        receiver, sender = self.members[receiver], self.members[sender]
        with self.place.waiting_for(receiver):  # as in _post
            offered = send_ticket(tensor, receiver, own_link)
        with self.place.waiting_for(sender):
            fetched = self.fetcher.fetch(received, sender, link_of_sender, self.limit)
        return [(sender, fetched), *((receiver, work) for work in offered)]

    def _over_the_network(
        self, tensor: torch.Tensor, receiver: int, received: torch.Tensor, sender: int
    ) -> list[tuple[int, dist.Work]]:
        posts = [
            (self.ring_rank % 2, dist.isend, in_memory(tensor), self.members[receiver]),
            (sender % 2, dist.irecv, in_memory(received), self.members[sender]),
        ]
        works = []
        for link in (0, 1):
            posted = [
                dist.P2POp(op, x, peer, self.links[link])
                for number, op, x, peer in posts
                if number == link
            ]
            works += self._post(posted) if posted else []
        return works

    def _post(self, posted: list[dist.P2POp]) -> list[tuple[int, dist.Work]]:
        """Does not block; but where a neighbour has died it is here, or in waiting, that gloo says so."""
        with self.place.waiting_for(posted[0].peer):
            works = dist.batch_isend_irecv(posted)
        return [
            (op.peer, work) for op, work in zip(posted, works)
        ]  # NCCL has one work for the whole batch


@dataclass(frozen=True)
class ProcessGroups:
    """The groups this process talks in. None where it would talk to itself alone.

    data_context: all that share parameters and differ in tokens, D x C: losses and counts are summed over it.
    ring_links: the two communicators of this process's ring. ulysses: those that trade heads for tokens with it.
    tensor: those that split every layer with it. model: those that hold one copy of all parameters between them, P x T.
    """

    data_context: dist.ProcessGroup | None = None
    ring_links: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    ulysses: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None
    model: dist.ProcessGroup | None = None

    @staticmethod
    def build(grid: Grid, global_rank: int, ring_timeout: int = 0) -> "ProcessGroups":
        """Build every group of the grid; all processes call it, in the same place. Blocks until all have.

        ``ring_timeout``: seconds after which a watchdog ends a wait in the ring; torch itself would a minute later,
        NCCL's own watchdog included. 0: there is none, and torch's limit is its default.
        """
        limit = (
            timedelta(seconds=ring_timeout + _SECONDS_FOR_THE_WATCHDOG) if ring_timeout else None
        )
        return ProcessGroups(
            data_context=_own_group(grid.members("data", "ring", "ulysses"), global_rank),
            ring_links=_ring_links(grid, global_rank, limit),
            ulysses=_own_group(grid.members("ulysses"), global_rank),
            tensor=_own_group(grid.members("tensor"), global_rank),
            model=_own_group(grid.members("pipe", "tensor"), global_rank),
        )

    @property
    def data_context_rank_and_size(self) -> tuple[int, int]:
        """(rank, ranks) of this process among those that share its parameters: data x context."""
        group = self.data_context
        return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` summed over data x context, in place, and returned."""
        if self.data_context is not None:
            dist.all_reduce(tensor, group=self.data_context)
        return tensor


_unlimited: set[str] = set()  # names of the links whose waits a watchdog limits


def let_links_outlast_suspensions(links: tuple[dist.ProcessGroup, dist.ProcessGroup]) -> None:
    """Leave the time limit of waits on these links to the watchdog, which must run from now on.

    gloo counts the time in which its process was suspended as time that it has waited, and the
    watchdog does not. NCCL's limit stays: the host does not wait for the device, so that it is the
    only one there.
    """
    if "nccl" not in dist.get_backend_config(links[0]):
        _unlimited.update(link.group_name for link in links)


def _ring_links(
    grid: Grid, global_rank: int, limit: timedelta | None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
    if grid.ring == 1:
        return None
    links = tuple(
        _own_group(grid.members("ring"), global_rank, limit, _link_options(limit)) for _ in range(2)
    )
    for link in links:
        # NCCL makes its communicator at the first call, which all ranks of the group must join; in an odd ring
        # rank 0 has no transfer on the second link.
        dist.barrier(group=link)
    if "nccl" not in dist.get_backend_config():  # which has ways of its own within a machine
        probe_shared_memory(links[0])
    return links


def _link_options(limit: timedelta | None) -> "dist.ProcessGroupNCCL.Options | None":
    """Of one link alone, since torch writes into them; None where NCCL is not what talks.

    NCCL copies by kernels. On a stream of high priority they get the next free multiprocessors, before those blocks of
    an attention kernel that have yet to start.
    """
    if "nccl" not in dist.get_backend_config():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if limit is not None:
        options._timeout = limit  # torch goes by the group's, and warns where the two differ
    return options


def _own_group(
    groups: list[list[int]],
    global_rank: int,
    limit: timedelta | None = None,
    options: "dist.ProcessGroupNCCL.Options | None" = None,  # a class that torch built without NCCL lacks
) -> dist.ProcessGroup | None:
    if len(groups[0]) == 1:
        return None
    own, _ = dist.new_subgroups_by_enumeration(groups, timeout=limit, pg_options=options)
    return own
