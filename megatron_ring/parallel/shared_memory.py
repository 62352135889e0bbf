"""Messages between processes of one machine: memory that who sends writes, and who receives reads where it lies.

Over a network a message is copied into the kernel and out of it, packet by packet, by the cores that should compute.
Within a machine one copy is enough. The sender writes the message to memory that others can map, and what goes over the
link is a ticket that says where. What is received is that memory itself, and when no tensor is left on it, it is the
sender's again. (docs/decisions/0019-within-a-machine-tickets-travel.md)

The memory is files without a name (Linux's memfd), which others open through /proc. They end with the processes that
have them open, however these end, and /dev/shm, of which a container has 64 MB, is not asked for room.
"""

import functools
import mmap
import os
import secrets
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.parallel.messages import unpacked

# Before a message stands whether somebody has it; the rest of this is for alignment.
_HEADER = 64
_TITLE = "megatron_ring messages"  # of the files, by which /proc shows them

_shared_by: dict[str, bool] = {}  # groups by their names


def meet(group: dist.ProcessGroup) -> None:
    """Find out whether all of ``group`` can read each other's memory. Collective; blocks until all have called it.

    Who is in another network namespace counts as another machine, as a container does, or a machine that is simulated.
    """
    number = torch.tensor([secrets.randbits(62)])
    said, agreed = ([None] * group.size() for _ in range(2))
    dist.all_gather_object(said, (_machine(), _ticket_for(number), number.item()), group=group)
    dist.all_gather_object(agreed, all(_can_read(*each) for each in said), group=group)
    _shared_by[group.group_name] = all(agreed)


def is_shared_by(group: dist.ProcessGroup) -> bool:
    """Whether its members can read each other's memory, as they found when they met; False where they did not meet."""
    return _shared_by.get(group.group_name, False)


def _machine() -> tuple[str, ...] | None:
    """What tells this machine, its numbers of processes and its network from all others; None where nothing does."""
    try:
        namespaces = (os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))
        return Path("/proc/sys/kernel/random/boot_id").read_text(), *namespaces
    except OSError:
        return None


def _ticket_for(number: torch.Tensor) -> list[int] | None:
    try:
        return SharedRoom.of_this_process().posted(number).tolist()
    except (AttributeError, OSError):  # no memfd, as on macOS, or no memory
        return None


def _can_read(machine: tuple[str, ...] | None, ticket: list[int] | None, number: int) -> bool:
    if machine is None or machine != _machine() or ticket is None:
        return False
    like = torch.tensor([number])
    try:
        return torch.equal(SharedRoom.of_this_process().arrived(torch.tensor(ticket), like), like)
    except MemoryGone:  # another user's, perhaps
        return False


class MemoryGone(RuntimeError):
    """A message's memory cannot be opened: who sent it has ended. Of the class of what gloo raises then."""


class SharedRoom:
    """As ``Room``, where messages arrive in their sender's memory.

    A message's memory is taken until its receiver has no tensor on it. Then it is used again; so much is kept as was
    ever on its way at one time.
    """

    def __init__(self):
        self._own: list[_OwnSegment] = []
        self._seen: dict[int, mmap.mmap] = {}

    @staticmethod
    @functools.cache
    def of_this_process() -> "SharedRoom":
        return SharedRoom()

    def posted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write ``tensor`` where its receiver will read it; the ticket for it, (3,) int64."""
        segment = self._free(tensor.nbytes)
        segment.put(tensor)
        return torch.tensor(segment.ticket)

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Where a ticket arrives."""
        return torch.empty(3, dtype=torch.int64)

    def arrived(self, ticket: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What the ticket is for, a tensor like this one, in the memory of who sent it."""
        pid, descriptor, name = ticket.tolist()
        if name not in self._seen:
            self._seen[name] = _opened(pid, descriptor)
        return _received(self._seen[name], like)

    def give_back(self, tensor: torch.Tensor) -> None:
        """Nothing of what was sent from here is needed any longer."""

    def _free(self, size: int) -> "_OwnSegment":
        fits = [segment for segment in self._own if segment.size >= size and not segment.taken]
        if not fits:
            self._own.append(_OwnSegment(size))
            return self._own[-1]
        return min(fits, key=lambda segment: segment.size)


# A child writes to memory of its own.
os.register_at_fork(after_in_child=SharedRoom.of_this_process.cache_clear)


class _OwnSegment:
    """A piece of memory that this process writes messages to, of at most ``size`` bytes."""

    def __init__(self, size: int):
        self.size = size
        descriptor = os.memfd_create(_TITLE)
        os.ftruncate(descriptor, _HEADER + size)
        self._memory = mmap.mmap(descriptor, 0)
        self.ticket = (os.getpid(), descriptor, secrets.randbits(62))  # the last: its name, unlike any other's
        self._taken = _taken(self._memory)

    @property
    def taken(self) -> bool:
        """Whether what was put here last is still read."""
        return bool(self._taken[0])

    def put(self, tensor: torch.Tensor) -> None:
        message = torch.frombuffer(self._memory, dtype=torch.uint8, offset=_HEADER, count=tensor.nbytes)
        unpacked(message, [tensor])[0].copy_(tensor)
        self._taken[0] = 1


def _opened(pid: int, descriptor: int) -> mmap.mmap:
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_TITLE}"):  # whatever it is, it must not be written to
            raise FileNotFoundError(f"{path} is no longer memory for messages")
        opened = os.open(path, os.O_RDWR)
    except OSError as error:
        raise MemoryGone(f"cannot read what process {pid} sent: {error}") from error
    try:
        return mmap.mmap(opened, 0)
    finally:
        os.close(opened)


def _received(memory: mmap.mmap, like: torch.Tensor) -> torch.Tensor:
    """A tensor on what lies in ``memory``, which is the sender's again when the last tensor on it is gone."""
    message = np.frombuffer(memory, np.uint8, like.nbytes, _HEADER)
    # Torch holds the array as long as there is a tensor on it, be it another view than this.
    over = weakref.finalize(message, _release, _taken(memory), os.getpid())
    over.atexit = False
    return unpacked(torch.from_numpy(message), [like])[0]


def _release(taken: np.ndarray, reader: int) -> None:
    if os.getpid() == reader:  # and not a child of its, which has no tensors but may have references
        taken[0] = 0


def _taken(memory: mmap.mmap) -> np.ndarray:
    return np.frombuffer(memory, np.int64, 1)
