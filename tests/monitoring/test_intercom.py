"""What processes ask each other, and what strangers and other programs cannot do to them."""

import contextlib
import os
import resource
import socket
import threading
import time
from queue import SimpleQueue

import pytest

from megatron_ring.monitoring import intercom as intercom_module
from megatron_ring.monitoring.intercom import Intercom, NoAnswer
from megatron_ring.parallel.progress import Place, ProgressTracker
from tests.parallel.alone import Alone


@pytest.fixture
def intercom():
    """One whose alarms are in ``heard``."""
    heard: SimpleQueue[int] = SimpleQueue()
    intercom = Intercom(Alone(), ProgressTracker().read, heard.put)
    intercom.heard = heard
    yield intercom
    intercom.close()


def call(intercom: Intercom, words: str) -> bytes:
    with socket.create_connection(("127.0.0.1", intercom.own.port), 5) as line:
        line.sendall(words.encode() + b"\n")
        try:
            return line.makefile("rb").read()
        except ConnectionResetError:  # not all of what was sent has been read
            return b""


def elsewhere(intercom: Intercom, port: int, **changes: object) -> None:
    """Add a member of another host, which listens at this host's ``port``."""
    member = intercom.own._replace(rank=1, node="another", pids="another host's", port=port)
    intercom.members.append(member._replace(**changes))


def test_a_process_answers_where_it_is(intercom):
    found = intercom.ask(0)
    assert isinstance(found, Place)
    assert found[:5] == ProgressTracker().read()[:5]


def test_an_alarm_is_heard(intercom):
    intercom.members += [intercom.own] * 3
    call(intercom, f"{intercom.key} stalled 3")
    assert intercom.heard.get(timeout=5) == 3


@pytest.mark.parametrize("rank", ["1", "-1", "9" * 300, "x", ""])
def test_an_alarm_of_a_rank_that_does_not_exist_is_none(intercom, rank):
    assert call(intercom, f"{intercom.key} stalled {rank}") == b""
    assert isinstance(intercom.ask(0), Place)
    assert intercom.heard.empty()


@pytest.mark.parametrize(
    "words", ["where", "guessed stalled 0", "guessed where", "", "\xff" * 300, "x" * 100_000]
)
def test_a_stranger_reads_nothing_and_ends_nothing(intercom, words):
    assert call(intercom, words) == b""
    assert intercom.heard.empty()
    assert isinstance(intercom.ask(0), Place)


def test_on_one_host_only_loopback_is_listened_at(intercom):
    assert intercom.own.address == "127.0.0.1"


def own_threads() -> int:
    return sum(thread.name == "intercom" for thread in threading.enumerate())


def test_connections_of_strangers_take_no_threads_few_descriptors_and_no_answers_from_members(
    intercom,
):
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as strangers:
        for _ in range(400):
            line = socket.create_connection(("127.0.0.1", intercom.own.port), 5)
            strangers.enter_context(line)
            line.sendall(b"x")  # and no end of the line
        assert isinstance(intercom.ask(0), Place)
        # 400 are this test's own.
        assert len(os.listdir("/proc/self/fd")) - before - 400 <= 2 * intercom_module._CONNECTIONS
        assert own_threads() == 1


def test_a_request_has_one_deadline_however_it_arrives(monkeypatch):
    monkeypatch.setattr(intercom_module, "_SECONDS_FOR_A_REQUEST", 0.5)
    intercom = Intercom(Alone(), ProgressTracker().read, lambda rank: None)

    def send_slowly(line: socket.socket) -> None:
        for _ in range(300):
            line.sendall(b"x")
            time.sleep(0.1)

    address = "127.0.0.1", intercom.own.port
    with (
        contextlib.closing(intercom),
        socket.create_connection(address, 5) as slow,
        pytest.raises(ConnectionError),
    ):
        send_slowly(slow)


def test_without_descriptors_no_connection_is_accepted_and_afterwards_they_are(intercom):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as early:
        early.settimeout(10)
        descriptors = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors - 1, limits[1]))
        try:
            early.connect(("127.0.0.1", intercom.own.port))
            early.sendall(f"{intercom.key} where\n".encode())
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert early.recv(1000).startswith(b"[0, ")
    assert isinstance(intercom.ask(0), Place)


def test_a_closed_intercom_refuses_and_leaves_nothing_open():
    before, threads = len(os.listdir("/proc/self/fd")), own_threads()
    intercom = Intercom(Alone(), ProgressTracker().read, lambda rank: None)
    with socket.create_connection(("127.0.0.1", intercom.own.port), 5):
        intercom.ask(0)
        intercom.close()
    assert own_threads() == threads
    assert len(os.listdir("/proc/self/fd")) <= before
    elsewhere(intercom, intercom.own.port)
    assert intercom.ask(1).has_ended


def closed_port() -> socket.socket:
    taken = socket.socket()  # and not listening
    taken.bind(("127.0.0.1", 0))
    return taken


def own_pids() -> str:
    return intercom_module.pid_identity()


@pytest.mark.parametrize(
    ("changes", "has_ended", "reason"),
    [
        ({"pids": own_pids(), "pid": 2**22 + 1}, True, "does not live"),
        ({"pids": own_pids()}, False, "lives"),
        ({}, True, "refuses"),
    ],
    ids=["gone", "silent", "elsewhere"],
)
def test_what_became_of_one_that_refuses(intercom, changes, has_ended, reason):
    with closed_port() as closed:
        elsewhere(intercom, closed.getsockname()[1], **changes)
        answer = intercom.ask(1)
    assert answer.has_ended == has_ended
    assert reason in answer.reason


def test_one_that_is_silent_elsewhere_has_not_ended(intercom, monkeypatch):
    monkeypatch.setattr(intercom_module, "SECONDS_TO_ANSWER", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere(intercom, silent.getsockname()[1])
        assert intercom.ask(1) == NoAnswer(
            "does not answer: it is stopped, or its host cannot be reached"
        )


def test_one_to_which_there_is_no_way_has_not_ended(intercom):
    elsewhere(intercom, 1, address="no.such.node.invalid")
    assert not intercom.ask(1).has_ended


REPLIES = {
    "nothing": b"",
    "no JSON": b"\xff\xfe{",
    "an object": b'{"step": 1}',
    "too few": b"[1, 2, 3]",
    "text": b'["1", 0, 0, 0, 0, 1.0, -1]',
    "a flag": b"[true, 0, 0, 0, 0, 1.0, -1]",
    "not finite": b"[1, 0, 0, 0, 0, NaN, -1]",
    "for ever": b"[1, 0, 0, 0, 0, Infinity, -1]",
    "huge": b"[" + b"9" * 200 + b", 0, 0, 0, 0, 1.0, -1]",
    "no direction": b"[1, 0, 7, 0, 0, 1.0, -1]",
    "deep": b"[" * 400,
    "endless": b"[" + b"1, " * 100_000,
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_what_is_no_place_is_no_answer(intercom, reply):
    with socket.create_server(("127.0.0.1", 0)) as other:
        elsewhere(intercom, other.getsockname()[1])

        def answer() -> None:
            line, _ = other.accept()
            with line, contextlib.suppress(OSError):
                line.recv(1000)
                line.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        found = intercom.ask(1)
        thread.join()
    assert isinstance(found, NoAnswer)
    assert not found.has_ended


def test_a_reply_that_never_ends_is_given_up(intercom, monkeypatch):
    monkeypatch.setattr(intercom_module, "SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        elsewhere(intercom, other.getsockname()[1])
        over = threading.Event()

        def drip() -> None:
            line, _ = other.accept()
            with line, contextlib.suppress(OSError):
                while not over.wait(0.1):
                    line.sendall(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        found = intercom.ask(1)
        over.set()
        thread.join()
    assert isinstance(found, NoAnswer)
    assert not found.has_ended


def test_a_chain_ends_at_a_rank_that_does_not_exist():
    whereabouts = ProgressTracker()
    intercom = Intercom(Alone(), whereabouts.read, lambda rank: None)
    with contextlib.closing(intercom), whereabouts.waiting_for(5):
        (found,) = intercom.waits_from(0).values()
    assert found.waits_for == 5
