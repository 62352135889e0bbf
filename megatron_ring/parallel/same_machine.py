"""Messages between processes of one machine: who receives one reads it out of the sender's memory.

Over a network a message is copied into the kernel and out of it, packet by packet, by the cores that should compute.
Within a machine one copy is enough, from where it lies to where it is wanted: Linux's process_vm_readv. What goes over
the link is a ticket that says where it lies, and back comes a receipt, until which it must stay as it is.
(docs/decisions/0020-within-a-machine-tickets-travel.md)
"""

import contextlib
import ctypes
import os
import queue
import secrets
import threading
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

_C = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)

# What goes over a link may be either, in the same direction.
_TICKET, _RECEIPT = 0, 1


class MemoryUnreadable(RuntimeError):
    """A message cannot be read where it lies: who sent it has ended. Of the class of what gloo raises then."""


# ---- what travels ----


def send_ticket(
    message: torch.Tensor, receiver: int, link: dist.ProcessGroup
) -> tuple[dist.Work, dist.Work]:
    """Let a global rank read a dense tensor, which must stay as it is until both of these are over; does not block."""
    ticket = dist.isend(ticket_for(message), receiver, link, tag=_TICKET)
    return ticket, dist.irecv(torch.empty(1, dtype=torch.uint8), receiver, link, tag=_RECEIPT)


class Fetched(Future):
    """A message that is on its way here. Waited for as torch's Work is."""

    def wait(self) -> None:
        """Until it is here. Raises what went wrong on the way."""
        self.result()


class _Order(NamedTuple):
    fetched: Fetched
    ticket: torch.Tensor
    ticket_came: dist.Work
    into: torch.Tensor
    sender: int
    link: dist.ProcessGroup
    limit: timedelta | None


def wait(work: dist.Work | Fetched, limit: timedelta | None) -> None:
    """Until a transfer is over; ``limit`` in place of its group's, None: its group's."""
    if limit is None or isinstance(work, Fetched):
        work.wait()
    else:
        work.wait(limit)


class PeerMemoryReader:
    """Reads in the background what is offered to this process, one message after another, as gloo receives.

    So a receiver that is busy keeps no sender waiting. Its thread is a daemon, which no pool of Python's would give: a
    process that fails must be able to leave while a neighbour still owes it a ticket.
    """

    def __init__(self):
        self._orders = queue.SimpleQueue()
        threading.Thread(target=self._work, name="fetcher", daemon=True).start()

    def fetch(
        self,
        into: torch.Tensor,
        sender: int,
        link: dist.ProcessGroup,
        limit: timedelta | None = None,
    ) -> Fetched:
        """Receive in a tensor, dense as what is sent, what a global rank offers next on ``link``.

        Does not block. ``limit``: of the wait for it, in place of the link's.
        """
        fetched, ticket = Fetched(), torch.empty(3, dtype=torch.int64)
        ticket_came = dist.irecv(ticket, sender, link, tag=_TICKET)
        self._orders.put(_Order(fetched, ticket, ticket_came, into, sender, link, limit))
        return fetched

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            fetched, error = order.fetched, _carry_out(order)
            del order  # with the tensors, of which nothing must be kept behind the transfer
            if error:
                fetched.set_exception(error)  # for whoever waits, as torch's Work has it
            else:
                fetched.set_result(None)


def _carry_out(order: _Order) -> Exception | None:
    """What went wrong."""
    try:
        wait(order.ticket_came, order.limit)
        read(order.ticket, order.into)
        receipt = dist.isend(
            torch.ones(1, dtype=torch.uint8), order.sender, order.link, tag=_RECEIPT
        )
        wait(receipt, order.limit)
    except Exception as error:
        return error
    return None


# ---- whose memory can be read ----

_fetchers: dict[str, PeerMemoryReader | None] = {}  # by the names of the groups that met


def probe_shared_memory(group: dist.ProcessGroup) -> None:
    """Find out whether all of ``group`` can read each other's memory. Collective; blocks until all have called it.

    Who is in another network namespace counts as another machine, as a container does, or a machine that is simulated.
    """
    _let_others_read()
    number = torch.tensor([secrets.randbits(62)])
    said, agreed = [None] * group.size(), [None] * group.size()
    dist.all_gather_object(said, (_machine(), ticket_for(number), number.item()), group=group)
    dist.all_gather_object(agreed, all(_can_read(*each) for each in said), group=group)
    _fetchers[group.group_name] = PeerMemoryReader() if all(agreed) else None


def reader_within(group: dist.ProcessGroup) -> PeerMemoryReader | None:
    """What reads the messages of its members; None where one of them cannot be read, or they did not meet."""
    return _fetchers.get(group.group_name)


def _let_others_read() -> None:
    """Where Linux's Yama guards the memory of processes, as on Ubuntu, each must allow it."""
    with contextlib.suppress(AttributeError):  # as on macOS, which has no such call
        _C.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _machine() -> tuple[str, ...] | None:
    """What tells this machine, its numbers of processes and its network from all others; None where nothing does."""
    try:
        namespaces = (os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))
        return Path("/proc/sys/kernel/random/boot_id").read_text(), *namespaces
    except OSError:
        return None


def _can_read(machine: tuple[str, ...] | None, ticket: torch.Tensor, number: int) -> bool:
    if machine is None or machine != _machine():
        return False
    found = torch.zeros(1, dtype=torch.int64)
    try:
        read(ticket, found)
    except (AttributeError, MemoryUnreadable):  # no such call, or not allowed
        return False
    return found.item() == number


# ---- reading ----


class _Span(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def ticket_for(message: torch.Tensor) -> torch.Tensor:
    """Where a dense tensor lies: (3,) int64, the process, the address in it and the bytes."""
    return torch.tensor([os.getpid(), message.data_ptr(), message.nbytes])


def read(ticket: torch.Tensor, into: torch.Tensor) -> None:
    """Copy what the ticket is for into a tensor that is dense as the message is. Raises MemoryUnreadable."""
    pid, address, size = ticket.tolist()
    if pid <= 0 or address < 0 or size != into.nbytes:
        raise MemoryUnreadable(
            f"process {pid} offers a message of {size} bytes at {address}, where {into.nbytes} are waited for"
        )
    done = 0
    while done < size:
        here, there = (_Span(start + done, size - done) for start in (into.data_ptr(), address))
        copied = _readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if copied <= 0:
            raise MemoryUnreadable(
                f"cannot read what process {pid} sent: {os.strerror(ctypes.get_errno())}"
            )
        done += copied


def _readv(pid: int, *spans_and_flags) -> int:
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
    return function(pid, *spans_and_flags)
