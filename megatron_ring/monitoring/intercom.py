"""Processes of a run ask each other where they are, each over TCP connections of its own.

A healthy run sends nothing. Every process answers from a thread of its own, whatever its main
thread does; if a process has died, its host refuses the connection, and if it is stopped, the
asker waits in vain. A request carries the run's key, so that port scanners and other runs cannot
read anything or end a job. The key is sent in clear: docs/security.md states what it protects from.

A process listens at one address only: loopback if all processes share a host, otherwise the address
by which other hosts reach it (addresses.py). Requests, replies, the time they may take and the
number of open connections are all limited.
"""

import asyncio
import contextlib
import hmac
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil

from megatron_ring.monitoring.addresses import listen, network_identity, pid_identity
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import NO_RANK, Direction, Place

SECONDS_TO_ANSWER = 3.0
"""For a whole question: the connection, the request and the reply."""

_CALLS_AT_ONCE = 32
_BYTES_OF_A_MESSAGE = 512  # a request has about 50 bytes, a reply about 40
_SECONDS_FOR_A_REQUEST = 5.0
# Every rank may ask at once. Together they bound the descriptors that a flood of connections takes.
_CONNECTIONS = 128
_BACKLOG = 128


class Member(NamedTuple):
    """A process of the run, and where it listens.

    node: the host's name, for messages. pids: in which set of process ids ``pid`` is valid.
    """

    rank: int
    node: str
    pid: int
    pids: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, pid {self.pid})"


class NoAnswer(NamedTuple):
    """Why a process did not answer. has_ended: it is known to have ended, not only silent."""

    reason: str
    has_ended: bool = False

    def __str__(self) -> str:
        return self.reason


class Intercom:
    """This process's connections to the others.

    place: returns where this process is. alarmed: called with the rank that another one suspects.
    members, networks: by rank; ranks of one network are on one host.
    """

    def __init__(
        self, consensus: Consensus, place: Callable[[], Place], alarmed: Callable[[int], None]
    ):
        """Collective: all processes create theirs at the same time. Blocks until all have."""
        self.key = consensus.run_on_rank_zero(lambda: secrets.token_hex(16))
        self.networks: list[str] = consensus.gather(network_identity)
        listening = listen(on_one_host=len(set(self.networks)) == 1, backlog=_BACKLOG)
        self._place, self._alarmed = place, alarmed
        address, port, *_ = listening.getsockname()
        self.own = Member(
            consensus.rank, socket.gethostname(), os.getpid(), pid_identity(), address, port
        )
        self.members: list[Member] = []
        self._server = _Server(listening, self._reply)
        self.members = consensus.gather(lambda: self.own)

    def close(self) -> None:
        """Stop listening, and drop the connections that are open."""
        self._server.close()

    def ask(self, rank: int) -> Place | NoAnswer:
        """Where that process is; if it does not answer, what is known of the reason."""
        member = self.members[rank]
        try:
            return _place_from(self._exchange(member, "where"))
        except (OSError, ValueError) as error:
            return _no_answer(member, error, self.own.pids)

    def waits_from(self, rank: int) -> dict[Member, Place | NoAnswer]:
        """The chain of waits from ``rank`` on.

        It ends at a process that waits for no other, does not answer, or is in the chain already.
        """
        found: dict[Member, Place | NoAnswer] = {}
        while 0 <= rank < len(self.members) and (member := self.members[rank]) not in found:
            found[member] = self.ask(rank)
            rank = found[member].waits_for if isinstance(found[member], Place) else NO_RANK
        return found

    def alarm(self, suspect: int) -> None:
        """Report to every other process which rank holds this one up. Ignores those that fail."""
        others = [member for member in self.members if member != self.own]
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            calls.map(lambda member: self._alarm(member, suspect), others)

    def _alarm(self, member: Member, suspect: int) -> None:
        with contextlib.suppress(OSError):
            self._exchange(member, f"stalled {suspect}")

    def _exchange(self, member: Member, words: str) -> bytes:
        """Send a request; returns the reply, which another program may have sent."""
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        with socket.create_connection((member.address, member.port), SECONDS_TO_ANSWER) as line:
            line.sendall(f"{self.key} {words}\n".encode())
            reply = b""
            while len(reply) < _BYTES_OF_A_MESSAGE:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the reply was not complete in time")
                line.settimeout(left)
                received = line.recv(_BYTES_OF_A_MESSAGE - len(reply))
                if not received:
                    break
                reply += received
            return reply

    def _reply(self, request: bytes) -> bytes:
        """What to send to another process; nothing to one without the run's key."""
        key, *words = request.split() or [b""]
        if not hmac.compare_digest(key, self.key.encode()):
            return b""
        match words:
            case [b"where"]:
                return json.dumps(self._place()).encode()
            case [b"stalled", suspect] if suspect.isdigit() and int(suspect) < len(self.members):
                self._alarmed(int(suspect))
        return b""


class _Server:
    """Answers one request a connection, from one thread; what it may hold and wait for is limited.

    Of more than _CONNECTIONS that have not sent a whole request, the oldest is closed: a member
    sends its request as soon as it is connected, so it is not the one to suffer from a flood.
    """

    def __init__(self, listening: socket.socket, reply: Callable[[bytes], bytes]):
        self._reply = reply
        self._open: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._is_serving = threading.Event()
        self._loop = asyncio.new_event_loop()
        # What a stranger does wrong must not fill the run's log. If the process has no descriptor
        # left for a connection, asyncio accepts none for a second, and tries again.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="intercom", daemon=True
        )
        self._thread.start()
        self._is_serving.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, listening: socket.socket) -> None:
        serving = asyncio.start_server(
            self._serve, sock=listening, limit=_BYTES_OF_A_MESSAGE, backlog=_BACKLOG
        )
        server = self._loop.run_until_complete(serving)
        self._is_serving.set()
        self._loop.run_forever()
        server.close()
        for writer in self._open:
            writer.transport.abort()
        self._loop.run_until_complete(_cancel(asyncio.all_tasks(self._loop)))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            async with asyncio.timeout(_SECONDS_FOR_A_REQUEST):
                writer.write(self._reply(await reader.readuntil(b"\n")))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._open.pop(writer, None)
            writer.close()


async def _cancel(tasks: set[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _place_from(reply: bytes) -> Place:
    """The place that a process has replied. Raises ValueError for anything else."""
    values = json.loads(reply)
    if not isinstance(values, list) or len(values) != len(Place._fields):
        raise ValueError("a reply without a place")
    place = Place(*values)
    whole = [value for name, value in zip(Place._fields, place) if name != "seconds"]
    if not all(type(value) is int and -1 <= value < 2**63 for value in whole):
        raise ValueError("a place whose numbers are not whole or out of range")
    if type(place.seconds) not in (int, float) or not 0 <= place.seconds < math.inf:
        raise ValueError("a place without a duration")
    Direction(place.direction)  # a ValueError too
    return place


# The state of a process of this host that does not answer.
_STATUS = {
    psutil.STATUS_STOPPED: "is stopped by a signal",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
}


def _no_answer(member: Member, error: Exception, own_pids: str) -> NoAnswer:
    """What is known of a process that did not answer. own_pids: this process's set of pids."""
    if member.pids == own_pids:
        try:
            status = psutil.Process(member.pid).status()
        except psutil.NoSuchProcess:
            return NoAnswer("does not live: there is no such process", has_ended=True)
        except psutil.Error:
            return NoAnswer("does not answer, and its state cannot be read")
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return NoAnswer("does not live: it has ended", has_ended=True)
        return NoAnswer(_STATUS.get(status, "lives, but does not answer"))
    if isinstance(error, ConnectionRefusedError):
        return NoAnswer("does not live: its host refuses connections at its port", has_ended=True)
    if isinstance(error, TimeoutError):
        return NoAnswer("does not answer: it is stopped, or its host cannot be reached")
    if isinstance(error, ValueError):
        return NoAnswer("does not answer as a process of this run does")
    return NoAnswer(f"cannot be asked: {error}")
