"""Processes that ask each other where they are, each over a socket of its own, so that none depends on a third.

Nothing is sent while all is well. A process that is asked answers from a thread of its own, whatever else it does; one
that died refuses, for its socket died with it, and one that was stopped lets the caller wait. Who asks must know the
run's key, so that no stranger can end a job. It listens on all addresses of its node, whose name the others must be
able to resolve.
"""

import contextlib
import json
import os
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil

from megatron_ring.parallel.agreement import Agreement
from megatron_ring.parallel.whereabouts import NOBODY, Place

_SECONDS_TO_ANSWER = 3.0
_CALLS_AT_ONCE = 32


class Member(NamedTuple):
    """A process of the run, and where it listens."""

    rank: int
    node: str
    pid: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, pid {self.pid})"


class Intercom:
    """This process's line to the others. ``place`` says where it is, ``alarmed`` is told whom another suspects."""

    def __init__(self, agreement: Agreement, place: Callable[[], Place], alarmed: Callable[[int], None]):
        """Collective: all processes make theirs at the same time."""
        self.key = agreement.on_rank_0(lambda: secrets.token_hex(16))
        self._server = _Server(self.key, place, alarmed)
        node = socket.gethostname()
        self.own = Member(agreement.rank, node, os.getpid(), _address(node), self._server.server_address[1])
        self.members: list[Member] = agreement.on_all(lambda: self.own)
        threading.Thread(target=self._server.serve_forever, name="intercom", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ask(self, rank: int) -> Place | str:
        """Where that process is; if it cannot say, what became of it."""
        member = self.members[rank]
        try:
            with self._called(member, "where") as line:
                return Place(*json.loads(line.makefile().readline()))
        except (OSError, ValueError) as error:  # a line that ends before the answer is a ValueError of json's
            return _fate(member, error, self.own.node)

    def waits_from(self, rank: int) -> dict[Member, Place | str]:
        """Who waits for whom from ``rank`` on, to one that waits for nobody, or cannot say, or was asked before."""
        found: dict[Member, Place | str] = {}
        while rank != NOBODY and (member := self.members[rank]) not in found:
            found[member] = self.ask(rank)
            rank = found[member].waits_for if isinstance(found[member], Place) else NOBODY
        return found

    def alarm(self, suspect: int) -> None:
        """Tell every other process which rank holds this one up; those that cannot hear are passed over."""
        others = [member for member in self.members if member != self.own]
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            calls.map(lambda member: self._alarm(member, suspect), others)

    def _alarm(self, member: Member, suspect: int) -> None:
        with contextlib.suppress(OSError), self._called(member, f"stalled {suspect}"):
            pass

    def _called(self, member: Member, words: str) -> socket.socket:
        host = "127.0.0.1" if member.node == self.own.node else member.address
        line = socket.create_connection((host, member.port), _SECONDS_TO_ANSWER)
        line.sendall(f"{self.key} {words}\n".encode())
        return line


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128  # every rank may call at once

    def __init__(self, key: str, place: Callable[[], Place], alarmed: Callable[[int], None]):
        super().__init__(("", 0), _Call)
        self.key, self.place, self.alarmed = key, place, alarmed

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that says nothing, or hangs up, is no fault to speak of."""


class _Call(socketserver.StreamRequestHandler):
    timeout = 5
    server: _Server

    def handle(self) -> None:
        match self.rfile.readline(200).decode(errors="replace").split():
            case [self.server.key, "where"]:
                self.wfile.write(json.dumps(self.server.place()).encode())
            case [self.server.key, "stalled", suspect]:
                self.server.alarmed(int(suspect))


def _address(node: str) -> str:
    """What others reach this node by: the address it knows of itself, or its name where that is only a loopback's."""
    try:
        address = socket.gethostbyname(node)
    except OSError:
        return node
    return node if address.startswith("127.") else address


# Of a process on this node that does not answer.
_STATUS = {
    psutil.STATUS_ZOMBIE: "does not live: it has ended",
    psutil.STATUS_STOPPED: "is stopped by a signal",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
}


def _fate(member: Member, error: Exception, here: str) -> str:
    """What is known of a process that could not be asked; ``here`` is this process's node."""
    if member.node == here:
        try:
            return _STATUS.get(psutil.Process(member.pid).status(), "lives, but does not answer")
        except psutil.NoSuchProcess:
            return "does not live: there is no such process"
    if isinstance(error, TimeoutError):
        return "does not answer: it is stopped, or its node is out of reach"
    if isinstance(error, ConnectionError | ValueError):
        return "does not live: nobody answers where it listened"
    return f"cannot be asked: {error}"
