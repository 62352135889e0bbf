"""Requests between the processes of a run for each other's progress, over TCP.

A healthy run sends nothing. Every process serves requests from a thread of its own, whatever its
main thread is doing. If a process has died, its host refuses the connection; if it is stopped, the
request times out. A request carries the run's key, so that port scanners and other runs cannot read
anything or end a job. The key is sent in clear text; docs/security.md states what it protects from.

A process listens on one address only: loopback if all processes share a host, otherwise the address
at which other hosts reach it (addresses.py). The sizes of requests and responses, the time they may
take and the number of open connections are limited.
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
from megatron_ring.parallel.progress import NO_RANK, Direction, ProgressSnapshot

RESPONSE_TIMEOUT = 3.0
"""Seconds for a whole exchange: connecting, sending the request and receiving the response."""

# A killed process closes its sockets, one after another, before its state shows that it has ended.
_SECONDS_TO_END = 1.0

_CONCURRENT_REQUESTS = 32
_MAX_MESSAGE_BYTES = 512  # a request has about 50 bytes, a response about 40
_REQUEST_TIMEOUT = 5.0  # seconds for a peer to send its request
# All ranks may send a request at once. The two limits together bound the number of descriptors
# that a flood of connections uses.
_MAX_CONNECTIONS = 128
_BACKLOG = 128


class Peer(NamedTuple):
    """A process of the run and the address it listens on.

    node: the host's name, for messages. pids: the namespace in which ``pid`` is valid.
    """

    rank: int
    node: str
    pid: int
    pids: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, pid {self.pid})"


class NoResponse(NamedTuple):
    """The reason why a peer did not respond.

    reason: continues a sentence that starts with the peer. has_ended: the peer is known to have
    ended; otherwise it may be alive.
    """

    reason: str
    has_ended: bool = False

    def __str__(self) -> str:
        return self.reason


class Intercom:
    """Serves the requests of this process's peers, and sends requests to them.

    read_progress: returns this process's progress. on_stall: called with the suspected rank when a
    peer reports a stall. members, networks: by rank; ranks with the same network are on one host.
    """

    def __init__(
        self,
        consensus: Consensus,
        read_progress: Callable[[], ProgressSnapshot],
        on_stall: Callable[[int], None],
    ):
        """Start serving and exchange addresses; collective, blocks until all processes serve."""
        self.key = consensus.run_on_rank_zero(lambda: secrets.token_hex(16))
        self.networks: list[str] = consensus.gather(network_identity)
        on_one_host = len(set(self.networks)) == 1
        listening = listen(on_one_host, _BACKLOG)
        self._read_progress = read_progress
        self._on_stall = on_stall
        address, port, *_ = listening.getsockname()
        self.own = Peer(
            consensus.rank, socket.gethostname(), os.getpid(), pid_identity(), address, port
        )
        self.members: list[Peer] = []
        self._server = _Server(listening, self._respond)
        self.members = consensus.gather(lambda: self.own)

    def close(self) -> None:
        """Stop listening and drop all open connections."""
        self._server.close()

    def ask(self, rank: int) -> ProgressSnapshot | NoResponse:
        """Request a peer's progress; returns the reason if there is no valid response."""
        peer = self.members[rank]
        try:
            return _parse_progress(self._exchange(peer, "progress"))
        except (OSError, ValueError) as error:
            return _diagnose(peer, error, self.own.pids)

    def wait_chain(self, rank: int) -> dict[Peer, ProgressSnapshot | NoResponse]:
        """Follow the chain of waits from ``rank`` and return what each peer in it reports.

        The chain ends at a peer that does not wait for another, does not respond, or is already in
        the chain.
        """
        chain: dict[Peer, ProgressSnapshot | NoResponse] = {}
        while 0 <= rank < len(self.members):
            peer = self.members[rank]
            if peer in chain:
                break
            response = self.ask(rank)
            chain[peer] = response
            rank = response.waits_for if isinstance(response, ProgressSnapshot) else NO_RANK
        return chain

    def report_stall(self, suspect: int) -> None:
        """Report to every peer which rank stalls this one; failed requests are ignored."""
        others = [peer for peer in self.members if peer != self.own]
        with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as requests:
            requests.map(lambda peer: self._send_stall(peer, suspect), others)

    def _send_stall(self, peer: Peer, suspect: int) -> None:
        with contextlib.suppress(OSError):
            self._exchange(peer, f"stalled {suspect}")

    def _exchange(self, peer: Peer, request: str) -> bytes:
        """Send a request and return the response, which may come from another program."""
        deadline = time.monotonic() + RESPONSE_TIMEOUT
        address = (peer.address, peer.port)
        with socket.create_connection(address, RESPONSE_TIMEOUT) as connection:
            connection.sendall(f"{self.key} {request}\n".encode())
            response = b""
            while len(response) < _MAX_MESSAGE_BYTES:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError("the response was not complete in time")
                connection.settimeout(remaining)
                received = connection.recv(_MAX_MESSAGE_BYTES - len(response))
                if not received:
                    break
                response += received
            return response

    def _respond(self, request: bytes) -> bytes:
        """Return the response to a request; empty without the run's key."""
        key, *words = request.split() or [b""]
        if not hmac.compare_digest(key, self.key.encode()):
            return b""
        match words:
            case [b"progress"]:
                return json.dumps(self._read_progress()).encode()
            case [b"stalled", suspect] if suspect.isdigit() and int(suspect) < len(self.members):
                self._on_stall(int(suspect))
        return b""


class _Server:
    """Serves one request per connection from a single thread, with bounded memory and time.

    When more than _MAX_CONNECTIONS have not sent a complete request, the oldest is closed. A peer
    sends its request as soon as it is connected, so a flood does not affect it.
    """

    def __init__(self, listening: socket.socket, respond: Callable[[bytes], bytes]):
        self._respond = respond
        self._open: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._is_serving = threading.Event()
        self._loop = asyncio.new_event_loop()
        # Errors caused by other programs must not fill the run's log. If the process has no
        # descriptor left for a connection, asyncio stops accepting for a second and retries.
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
            self._serve, sock=listening, limit=_MAX_MESSAGE_BYTES, backlog=_BACKLOG
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
        if len(self._open) >= _MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                writer.write(self._respond(await reader.readuntil(b"\n")))
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


def _parse_progress(response: bytes) -> ProgressSnapshot:
    """Parse a peer's progress; raises ValueError for anything else."""
    values = json.loads(response)
    if not isinstance(values, list) or len(values) != len(ProgressSnapshot._fields):
        raise ValueError("the response is not a list of progress values")
    progress = ProgressSnapshot(*values)
    for name, value in zip(ProgressSnapshot._fields, progress):
        if name != "seconds" and not (type(value) is int and -1 <= value < 2**63):
            raise ValueError(f"{name} is not a whole number in range")
    if type(progress.seconds) not in (int, float) or not 0 <= progress.seconds < math.inf:
        raise ValueError("seconds is not a duration")
    Direction(progress.direction)  # raises ValueError too
    return progress


# psutil's status of an unresponsive process on this host -> its description.
_STATUS = {
    psutil.STATUS_STOPPED: "is stopped by a signal",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
}


def _diagnose(peer: Peer, error: Exception, own_pids: str) -> NoResponse:
    """Determine why a peer did not respond. own_pids: this process's pid namespace."""
    if peer.pids == own_pids:
        # A stopped process still accepts connections, so that only the response times out.
        grace = 0.0 if isinstance(error, TimeoutError) else _SECONDS_TO_END
        return _diagnose_local(peer.pid, grace)
    if isinstance(error, ConnectionRefusedError):
        return NoResponse("is dead: its host refuses connections to its port", has_ended=True)
    if isinstance(error, TimeoutError):
        return NoResponse("is unresponsive: it is stopped, or its host is unreachable")
    if isinstance(error, ValueError):
        return NoResponse("is unresponsive: the response is not from a process of this run")
    return NoResponse(f"cannot be reached: {error}")


def _diagnose_local(pid: int, grace: float) -> NoResponse:
    """Determine why a process of this host did not respond; wait ``grace`` seconds for its end."""
    deadline = time.monotonic() + grace
    while not (found := _state_of(pid)).has_ended and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _state_of(pid: int) -> NoResponse:
    """Describe the state of a process of this host."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return NoResponse("is dead: there is no such process", has_ended=True)
    except psutil.Error:
        return NoResponse("is unresponsive, and its state cannot be read")
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return NoResponse("is dead: the process has exited", has_ended=True)
    return NoResponse(_STATUS.get(status, "is alive but unresponsive"))
