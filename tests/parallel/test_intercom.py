"""What processes tell each other, and what strangers may not."""

import os
import socket
from queue import SimpleQueue

import pytest

from megatron_ring.parallel.intercom import Intercom
from megatron_ring.parallel.whereabouts import Place, Whereabouts


class Alone:
    """The agreement of a world of one."""

    rank = 0

    def on_all(self, act):
        return [act()]

    def on_rank_0(self, act):
        return act()


@pytest.fixture
def intercom():
    """One whose alarms are in ``heard``."""
    heard: SimpleQueue[int] = SimpleQueue()
    intercom = Intercom(Alone(), Whereabouts().read, heard.put)
    intercom.heard = heard
    yield intercom
    intercom.close()


def call(intercom: Intercom, words: str) -> bytes:
    with socket.create_connection(("127.0.0.1", intercom.own.port), 5) as line:
        line.sendall(words.encode() + b"\n")
        return line.makefile("rb").read()


def test_a_process_answers_where_it_is(intercom):
    found = intercom.ask(0)
    assert isinstance(found, Place)
    assert found[:5] == Whereabouts().read()[:5]


def test_an_alarm_is_heard(intercom):
    call(intercom, f"{intercom.key} stalled 3")
    assert intercom.heard.get(timeout=5) == 3


@pytest.mark.parametrize("words", ["where", "guessed stalled 3", "guessed where", "", "\xff" * 300])
def test_a_stranger_is_told_nothing_and_ends_nothing(intercom, words):
    assert call(intercom, words) == b""
    assert intercom.heard.empty()


@pytest.mark.parametrize(
    ("node", "pid", "fate"),
    [
        (socket.gethostname(), 2**22 + 1, "does not live: there is no such process"),
        (socket.gethostname(), os.getpid(), "lives, but does not answer"),
        ("another", 1, "does not live: nobody answers where it listened"),
    ],
    ids=["gone", "silent", "elsewhere"],
)
def test_what_became_of_one_that_refuses(intercom, node, pid, fate):
    with socket.socket() as taken:  # and not listening
        taken.bind(("127.0.0.1", 0))
        intercom.members.append(
            intercom.own._replace(node=node, pid=pid, address="127.0.0.1", port=taken.getsockname()[1])
        )
        assert intercom.ask(1) == fate


def test_one_that_is_silent_elsewhere_may_be_stopped(intercom):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        other = intercom.own._replace(node="another", address="127.0.0.1", port=silent.getsockname()[1])
        intercom.members.append(other)
        assert intercom.ask(1) == "does not answer: it is stopped, or its node is out of reach"


def test_one_whose_name_is_unknown_cannot_be_asked(intercom):
    intercom.members.append(intercom.own._replace(node="another", address="no.such.node.invalid"))
    assert intercom.ask(1).startswith("cannot be asked: ")
