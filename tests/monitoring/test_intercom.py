"""The intercom reports progress to peers, and other programs can neither read it nor disturb it."""

import contextlib
import os
import resource
import socket
import subprocess
import threading
import time
from queue import SimpleQueue

import pytest

from megatron_ring.monitoring import intercom as intercom_module
from megatron_ring.monitoring.intercom import Intercom, NoResponse
from megatron_ring.parallel.progress import ProgressSnapshot, ProgressTracker
from tests.parallel.single_process import SingleProcessConsensus


@pytest.fixture
def intercom():
    """An intercom whose alarms arrive in the queue ``alarms``."""
    alarms: SimpleQueue[int] = SimpleQueue()
    intercom = Intercom(SingleProcessConsensus(), ProgressTracker().read, alarms.put)
    intercom.alarms = alarms
    yield intercom
    intercom.close()


def send(intercom: Intercom, request: str) -> bytes:
    """Send a request and return the response."""
    with socket.create_connection(("127.0.0.1", intercom.own.port), 5) as connection:
        connection.sendall(request.encode() + b"\n")
        try:
            return connection.makefile("rb").read()
        except ConnectionResetError:  # the server closed before it had read everything
            return b""


def add_remote_peer(intercom: Intercom, port: int, **changes: object) -> None:
    """Add a peer that appears to be on another host but listens on this host's ``port``."""
    peer = intercom.own._replace(rank=1, node="another", pids="another host's", port=port)
    intercom.members.append(peer._replace(**changes))


def test_a_peer_responds_with_its_progress(intercom):
    response = intercom.ask(0)
    assert isinstance(response, ProgressSnapshot)
    assert response[:5] == ProgressTracker().read()[:5]


def test_an_alarm_is_received(intercom):
    intercom.members += [intercom.own] * 3
    send(intercom, f"{intercom.key} stalled 3")
    assert intercom.alarms.get(timeout=5) == 3


@pytest.mark.parametrize("rank", ["1", "-1", "9" * 300, "x", ""])
def test_an_alarm_about_a_rank_that_does_not_exist_is_ignored(intercom, rank):
    assert send(intercom, f"{intercom.key} stalled {rank}") == b""
    assert isinstance(intercom.ask(0), ProgressSnapshot)
    assert intercom.alarms.empty()


@pytest.mark.parametrize(
    "request_text",
    ["progress", "guessed stalled 0", "guessed progress", "", "\xff" * 300, "x" * 100_000],
)
def test_without_the_key_nothing_is_read_and_no_alarm_raised(intercom, request_text):
    assert send(intercom, request_text) == b""
    assert intercom.alarms.empty()
    assert isinstance(intercom.ask(0), ProgressSnapshot)


def test_on_one_host_only_loopback_is_used(intercom):
    assert intercom.own.address == "127.0.0.1"


def intercom_threads() -> int:
    return sum(thread.name == "intercom" for thread in threading.enumerate())


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_flood_of_connections_uses_no_threads_few_descriptors_and_blocks_no_peer(intercom):
    before = open_descriptors()
    with contextlib.ExitStack() as connections:
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", intercom.own.port), 5)
            connections.enter_context(connection)
            connection.sendall(b"x")  # without an end of the line
        assert isinstance(intercom.ask(0), ProgressSnapshot)
        # 400 of the descriptors are this test's own.
        of_server = open_descriptors() - before - 400
        assert of_server <= 2 * intercom_module._MAX_CONNECTIONS
        assert intercom_threads() == 1


def test_the_deadline_of_a_request_holds_however_slowly_it_arrives(monkeypatch):
    monkeypatch.setattr(intercom_module, "_REQUEST_TIMEOUT", 0.5)
    intercom = Intercom(SingleProcessConsensus(), ProgressTracker().read, lambda rank: None)

    def send_slowly(connection: socket.socket) -> None:
        for _ in range(300):
            connection.sendall(b"x")
            time.sleep(0.1)

    address = ("127.0.0.1", intercom.own.port)
    with (
        contextlib.closing(intercom),
        socket.create_connection(address, 5) as slow,
        pytest.raises(ConnectionError),
    ):
        send_slowly(slow)


def test_connections_made_while_descriptors_are_short_are_accepted_later(intercom):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as early:
        early.settimeout(10)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() - 1, limits[1]))
        try:
            early.connect(("127.0.0.1", intercom.own.port))
            early.sendall(f"{intercom.key} progress\n".encode())
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert early.recv(1000).startswith(b"[0, ")
    assert isinstance(intercom.ask(0), ProgressSnapshot)


def test_a_closed_intercom_refuses_connections_and_leaves_nothing_open():
    before = open_descriptors()
    threads = intercom_threads()
    intercom = Intercom(SingleProcessConsensus(), ProgressTracker().read, lambda rank: None)
    with socket.create_connection(("127.0.0.1", intercom.own.port), 5):
        intercom.ask(0)
        intercom.close()
    assert intercom_threads() == threads
    assert open_descriptors() <= before
    add_remote_peer(intercom, intercom.own.port)
    assert intercom.ask(1).has_ended


def closed_port() -> socket.socket:
    """Reserve a port on which nothing listens."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


def own_pids() -> str:
    return intercom_module.pid_identity()


@pytest.mark.parametrize(
    ("changes", "has_ended", "reason"),
    [
        ({"pids": own_pids(), "pid": 2**22 + 1}, True, "is dead"),
        ({"pids": own_pids()}, False, "alive but unresponsive"),
        ({}, True, "refuses"),
    ],
    ids=["gone", "silent", "on another host"],
)
def test_a_refused_connection_is_diagnosed(intercom, changes, has_ended, reason):
    with closed_port() as closed:
        add_remote_peer(intercom, closed.getsockname()[1], **changes)
        response = intercom.ask(1)
    assert response.has_ended == has_ended
    assert reason in response.reason


def test_a_killed_peer_whose_port_is_closed_before_it_has_ended_is_dead(intercom):
    with closed_port() as closed, subprocess.Popen(["sleep", "0.3"]) as ending:
        add_remote_peer(intercom, closed.getsockname()[1], pids=own_pids(), pid=ending.pid)
        response = intercom.ask(1)
    assert response.has_ended
    assert "is dead" in response.reason


def test_a_silent_peer_on_another_host_is_not_known_to_have_ended(intercom, monkeypatch):
    monkeypatch.setattr(intercom_module, "RESPONSE_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        add_remote_peer(intercom, silent.getsockname()[1])
        response = intercom.ask(1)
    assert isinstance(response, NoResponse)
    assert "unresponsive" in response.reason
    assert "stopped" in response.reason, "distinguishable from a response of another program"
    assert not response.has_ended


def test_an_unreachable_peer_is_not_known_to_have_ended(intercom):
    add_remote_peer(intercom, 1, address="no.such.node.invalid")
    assert not intercom.ask(1).has_ended


INVALID_RESPONSES = {
    "empty": b"",
    "not JSON": b"\xff\xfe{",
    "an object": b'{"step": 1}',
    "too few values": b"[1, 2, 3]",
    "text": b'["1", 0, 0, 0, 0, 1.0, -1]',
    "a bool": b"[true, 0, 0, 0, 0, 1.0, -1]",
    "not a number": b"[1, 0, 0, 0, 0, NaN, -1]",
    "infinite": b"[1, 0, 0, 0, 0, Infinity, -1]",
    "huge": b"[" + b"9" * 200 + b", 0, 0, 0, 0, 1.0, -1]",
    "no direction": b"[1, 0, 7, 0, 0, 1.0, -1]",
    "deeply nested": b"[" * 400,
    "endless": b"[" + b"1, " * 100_000,
}


@pytest.mark.parametrize("content", INVALID_RESPONSES.values(), ids=INVALID_RESPONSES)
def test_an_invalid_response_counts_as_none(intercom, content):
    with socket.create_server(("127.0.0.1", 0)) as other:
        add_remote_peer(intercom, other.getsockname()[1])

        def respond() -> None:
            connection, _ = other.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                connection.sendall(content)

        thread = threading.Thread(target=respond)
        thread.start()
        response = intercom.ask(1)
        thread.join()
    assert isinstance(response, NoResponse)
    assert not response.has_ended


def test_a_response_that_never_ends_times_out(intercom, monkeypatch):
    monkeypatch.setattr(intercom_module, "RESPONSE_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        add_remote_peer(intercom, other.getsockname()[1])
        over = threading.Event()

        def send_slowly() -> None:
            connection, _ = other.accept()
            with connection, contextlib.suppress(OSError):
                while not over.wait(0.1):
                    connection.sendall(b" ")

        thread = threading.Thread(target=send_slowly)
        thread.start()
        response = intercom.ask(1)
        over.set()
        thread.join()
    assert isinstance(response, NoResponse)
    assert not response.has_ended


def test_a_chain_of_waits_ends_at_a_rank_that_does_not_exist():
    progress = ProgressTracker()
    intercom = Intercom(SingleProcessConsensus(), progress.read, lambda rank: None)
    with contextlib.closing(intercom), progress.waiting_for(5):
        [response] = intercom.wait_chain(0).values()
    assert response.waits_for == 5
