"""Messages between processes of one machine: the receiver reads them from the sender's memory.

Over a network a message is copied into the kernel and out of it, packet by packet, by the cores
that should compute. Within a machine one copy is enough, from the sender's tensor to the
receiver's: Linux's process_vm_readv. The link carries only a ticket with the address of the
message, and a receipt in return; until the receipt arrives the message must not change.
(docs/decisions/0020-ranks-on-one-host-read-messages-from-peer-memory.md)
"""

import contextlib
import ctypes
import os
import queue
import secrets
import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.parallel.process_id import boot_id, namespace_id

_C = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

# A link may carry both in the same direction, so their tags differ.
_TICKET_TAG = 0
_RECEIPT_TAG = 1


class MemoryUnreadable(RuntimeError):
    """A message cannot be read from its sender's memory, for example because the sender has ended.

    gloo raises a RuntimeError too if its peer has ended.
    """


# ---- sending and receiving ----


def send_ticket(
    message: torch.Tensor, receiver: int, link: dist.ProcessGroup
) -> tuple[dist.Work, dist.Work]:
    """Let a global rank read a dense tensor; does not block.

    Returns the send of the ticket and the receive of the receipt. The message must not change until
    both have completed.
    """
    ticket = dist.isend(ticket_for(message), receiver, link, tag=_TICKET_TAG)
    receipt = dist.irecv(torch.empty(1, dtype=torch.uint8), receiver, link, tag=_RECEIPT_TAG)
    return ticket, receipt


class ReadFuture(Future):
    """A message that is being read in the background; it is waited for like torch's Work."""

    def wait(self) -> None:
        """Block until the message was read; raise the error if reading failed."""
        self.result()


class _ReadRequest(NamedTuple):
    future: ReadFuture
    ticket: torch.Tensor
    ticket_work: dist.Work
    into: torch.Tensor
    sender: int
    link: dist.ProcessGroup
    timeout: timedelta | None


def wait(work: dist.Work | ReadFuture, timeout: timedelta | None) -> None:
    """Block until a transfer has completed; ``timeout`` None means that of its process group."""
    if timeout is None or isinstance(work, ReadFuture):
        work.wait()
    else:
        work.wait(timeout)


class PeerMemoryReader:
    """Reads messages for this process in the background, one after another, as gloo receives them.

    So a receiver that is busy does not delay its sender. The thread is a daemon, which Python's
    thread pools do not offer: a process that fails must be able to exit while it still waits for a
    neighbour's ticket.
    """

    def __init__(self):
        self._requests = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="peer-memory-reader", daemon=True).start()

    def start_read(
        self,
        into: torch.Tensor,
        sender: int,
        link: dist.ProcessGroup,
        timeout: timedelta | None = None,
    ) -> ReadFuture:
        """Read the next message that a global rank sends on ``link``; does not block.

        ``into`` must be dense in the same way as the message. ``timeout`` replaces that of the link
        in the waits for the ticket and for the receipt's send.
        """
        future = ReadFuture()
        ticket = torch.empty(3, dtype=torch.int64)
        ticket_work = dist.irecv(ticket, sender, link, tag=_TICKET_TAG)
        self._requests.put(_ReadRequest(future, ticket, ticket_work, into, sender, link, timeout))
        return future

    def _serve(self) -> None:
        while True:
            request = self._requests.get()
            future = request.future
            error = _read_and_acknowledge(request)
            del request  # it holds tensors, which must be freed with the transfer
            if error:
                future.set_exception(error)  # raised in the wait, as by torch's Work
            else:
                future.set_result(None)


def _read_and_acknowledge(request: _ReadRequest) -> Exception | None:
    """Carry out the request and return the error, if one occurred."""
    try:
        wait(request.ticket_work, request.timeout)
        read_peer_memory(request.ticket, request.into)
        receipt = torch.ones(1, dtype=torch.uint8)
        work = dist.isend(receipt, request.sender, request.link, tag=_RECEIPT_TAG)
        wait(work, request.timeout)
    except Exception as error:
        return error
    return None


# ---- which processes can read each other ----

_readers: dict[str, PeerMemoryReader | None] = {}  # by the names of groups that were probed


def probe_shared_memory(group: dist.ProcessGroup) -> None:
    """Find out whether all ranks of ``group`` can read each other's memory. Collective; blocks.

    A process in another network namespace, such as a container or a simulated machine, counts as
    one on another machine.
    """
    _allow_reading()
    number = torch.tensor([secrets.randbits(62)])
    probe = _machine_id(), ticket_for(number), number.item()
    probes = [None] * group.size()
    dist.all_gather_object(probes, probe, group=group)
    can_read_all = all(_can_read(*each) for each in probes)
    verdicts = [None] * group.size()
    dist.all_gather_object(verdicts, can_read_all, group=group)
    _readers[group.group_name] = PeerMemoryReader() if all(verdicts) else None


def peer_memory_reader(group: dist.ProcessGroup) -> PeerMemoryReader | None:
    """Return the reader of a group's messages; None if a rank is unreadable or not probed."""
    return _readers.get(group.group_name)


def _allow_reading() -> None:
    """Let others read this process's memory where Linux's Yama forbids it, as on Ubuntu."""
    with contextlib.suppress(AttributeError):  # macOS has no prctl
        _C.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _machine_id() -> tuple[str, ...] | None:
    """Return what identifies this machine, its pid namespace and its network; None if unknown."""
    machine = boot_id(), namespace_id("pid"), namespace_id("net")
    return machine if all(machine) else None


def _can_read(machine: tuple[str, ...] | None, ticket: torch.Tensor, number: int) -> bool:
    if machine is None or machine != _machine_id():
        return False
    read = torch.zeros(1, dtype=torch.int64)
    try:
        read_peer_memory(ticket, read)
    except (AttributeError, MemoryUnreadable):  # the system call is missing, or not permitted
        return False
    return read.item() == number


# ---- reading ----


class _MemoryRange(ctypes.Structure):
    """The system call's struct iovec."""

    _fields_ = [("address", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def ticket_for(message: torch.Tensor) -> torch.Tensor:
    """Return where a dense tensor is in memory: (3,) int64, process id, address and bytes."""
    return torch.tensor([os.getpid(), message.data_ptr(), message.nbytes])


def read_peer_memory(ticket: torch.Tensor, into: torch.Tensor) -> None:
    """Copy the message of a ticket to ``into``, which is dense in the same way.

    Raises MemoryUnreadable if the sizes differ or the memory cannot be read.
    """
    pid, address, size = ticket.tolist()
    if pid <= 0 or address < 0 or size != into.nbytes:
        raise MemoryUnreadable(
            f"process {pid} sends a message of {size} bytes at address {address}, "
            f"but {into.nbytes} bytes are expected"
        )
    done = 0
    while done < size:
        local = _MemoryRange(into.data_ptr() + done, size - done)
        remote = _MemoryRange(address + done, size - done)
        copied = _readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if copied <= 0:
            reason = os.strerror(ctypes.get_errno())
            raise MemoryUnreadable(f"cannot read the message of process {pid}: {reason}")
        done += copied


def _readv(pid: int, *ranges_and_flags) -> int:
    function = _C.process_vm_readv
    function.restype = ctypes.c_ssize_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    return function(pid, *ranges_and_flags)
