"""The watchdog: a ring in which a rank waits too long is named by every rank, and the job ends to be started again.

A thread looks once a second how long this process has waited for a neighbour in the ring. After ``--ring-timeout``, or
as soon as a neighbour is lost, it tells all other processes. Each of them says in one line where it is, whom it waits
for and at whom the chain of waits ends, and leaves with the exit code of RingStalled. Only a wait in the ring counts.

A process that has been outside of the ring for long, computing, saving, or in an all-reduce, asks
whether the next of its ring still lives. Evidence of its death is that its process is gone, or that
its host, which was reachable, refuses the connection. NullReporter, or a network without a route, is
none until it has lasted for half of ``--ring-timeout``. While the neighbour answers, a stall cannot
be distinguished from work, and is left to torch's own limit.

Time in which this process was suspended (``scontrol suspend``, ``docker pause``, SIGSTOP) is not
time that it has waited. The thread notices by its own clock: a second that took longer.

On CUDA, where this has not run, the device waits for a transfer and not the host. What a rank says is then which hop it
has handed to the device, and NCCL's own limit, which ProcessGroups derives from the same option, ends the wait.
"""

import collections
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType

import torch.distributed as dist

from megatron_ring.errors import RingStalled
from megatron_ring.monitoring.intercom import SECONDS_TO_ANSWER, Intercom, Member, NoAnswer
from megatron_ring.parallel.collectives import ProcessGroups, let_links_outlast_suspensions
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import NO_RANK, Place, ProgressTracker

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_QUESTIONS = 0.3
# A launcher kills all ranks once one has left, and one that has left cannot be asked.
_SECONDS_TO_SPEAK = 5.0
# What a wait or a question may take longer than it should before the process counts as suspended.
_SECONDS_OF_DELAY = 0.5
# A suspension that may have used up torch's limits on collectives, the shortest of ten minutes.
_SECONDS_OF_A_LONG_SUSPENSION = 300.0
_SECONDS_AFTER_A_SUSPENSION = 60.0  # within which its consequences are expected
_SUSPENSIONS = 64  # kept; a wait is limited, so that older ones do not matter


class Suspensions:
    """When this process did not run, noticed by a thread that knows how long its waits should take.

    One thread calls ``took``; any may call the rest.
    """

    def __init__(self):
        self._gaps: collections.deque[tuple[float, float]] = collections.deque(maxlen=_SUSPENSIONS)

    @contextlib.contextmanager
    def noticed(self, seconds: float) -> Iterator[None]:
        """Around something that takes at most ``seconds`` while the process runs."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.took(began, time.monotonic(), seconds)

    def took(self, began: float, ended: float, expected: float) -> None:
        """Note what took from ``began`` to ``ended`` on the monotonic clock.

        It should take ``expected`` seconds.
        """
        if ended - began > expected + _SECONDS_OF_DELAY:
            self._gaps.append((began + expected, ended))

    def seconds_in(self, seconds: float) -> float:
        """How many of the last ``seconds`` the process was suspended."""
        start = time.monotonic() - seconds
        return sum(max(0.0, ended - max(began, start)) for began, ended in tuple(self._gaps))

    def longest(self, seconds: float) -> float:
        """How long the longest suspension that ended within the last ``seconds`` was, or 0."""
        start = time.monotonic() - seconds
        return max(
            (ended - began for began, ended in tuple(self._gaps) if ended >= start), default=0.0
        )


def watched(
    place: ProgressTracker, groups: ProcessGroups, ring_timeout: int, consensus: Consensus
) -> AbstractContextManager:
    """What to train within: a watchdog over ``place``, or nothing where there is no ring or no limit. Collective."""
    if groups.ring_links is None or not ring_timeout:
        return contextlib.nullcontext()
    let_links_outlast_suspensions(groups.ring_links)
    members = dist.get_process_group_ranks(groups.ring_links[0])
    following = members[(members.index(consensus.rank) + 1) % len(members)]
    return Watchdog(place, following, ring_timeout, consensus)


class Watchdog:
    """A watchdog over this process, from entering to leaving. Building it is collective.

    following: the global rank behind this one in the ring; ring_timeout: seconds.
    """

    def __init__(
        self, place: ProgressTracker, following: int, ring_timeout: int, consensus: Consensus
    ):
        self.following = following
        self.ring_timeout = ring_timeout
        self.suspensions = Suspensions()
        self._whereabouts = place
        self.intercom = Intercom(consensus, self.read, self._alarmed)
        self._suspect: int | None = (
            None  # who holds this process up, or another that has told of it
        )
        self._told = self._over = False
        self._answers = False  # whether the next of the ring has ever answered
        self._silent_since: float | None = None
        self._found_dead = 0  # how often in a row
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def read(self) -> Place:
        """Where this process is, and for how long, without the time in which it was suspended."""
        place = self._whereabouts.read()
        return place._replace(
            seconds=max(0.0, place.seconds - self.suspensions.seconds_in(place.seconds))
        )

    def __enter__(self) -> "Watchdog":
        self._answers = isinstance(self.intercom.ask(self.following), Place)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(
            error, RuntimeError
        ):  # what torch raises where a process is lost, and where memory is short
            self._judge()
            suspended = self.suspensions.longest(_SECONDS_AFTER_A_SUSPENSION)
            if suspended >= _SECONDS_OF_A_LONG_SUSPENSION:
                self._end_after_suspension(suspended, error)
        self._over = True
        self._wake.set()
        self._thread.join()
        self.intercom.close()

    def _judge(self) -> None:
        """End the process if it lost the next of its ring, or if another one lost its own and says so in a moment."""
        place = self.read()
        if place.waits_for != NO_RANK:
            self._suspect = place.waits_for
        elif self._answers:
            self._ask_while_it_ends()
        if self._suspect is not None:
            self._wake.set()
        if self._wake.wait(_SECONDS_TO_SPEAK):
            self._thread.join()

    def _ask_while_it_ends(self) -> None:
        """Suspect the next of the ring if it has ended, or ends soon.

        Connections of a process are closed before it is gone.
        """
        deadline = time.monotonic() + _SECONDS_TO_SPEAK
        while time.monotonic() < deadline and not self._wake.is_set():
            answer = self.intercom.ask(self.following)
            if isinstance(answer, Place):
                return
            if answer.has_ended:
                self._suspect = self.following
                return
            self._wake.wait(_SECONDS_BETWEEN_QUESTIONS)

    def _alarmed(self, suspect: int) -> None:
        self._told, self._suspect = True, suspect
        self._wake.set()

    def _watch(self) -> None:
        while self._suspect is None and not self._waited():
            place = self.read()
            if place.waits_for != NO_RANK:
                if place.seconds >= self.ring_timeout:
                    self._suspect = place.waits_for
            elif place.seconds >= self.ring_timeout / 2:
                self._look_at_following(place)
        if not self._over:
            self._end()

    def _waited(self) -> bool:
        """Wait until the next look; whether there is to be none."""
        with self.suspensions.noticed(_SECONDS_BETWEEN_LOOKS):
            return self._wake.wait(_SECONDS_BETWEEN_LOOKS)

    def _look_at_following(self, place: Place) -> None:
        """Suspect the next of the ring if it has died, or has been silent for long.

        A process that finds another one dead asks it again a second later: at the end of a run it
        may have left just before this one does.
        """
        with self.suspensions.noticed(SECONDS_TO_ANSWER):
            answer = self.intercom.ask(self.following)
        now = time.monotonic()
        if isinstance(answer, Place):
            self._answers, self._silent_since, self._found_dead = True, None, 0
        if isinstance(answer, Place) or not self._answers:
            return  # what has never answered cannot fall silent: there may be a firewall in between
        if self._silent_since is None:
            self._silent_since = now
        self._found_dead = self._found_dead + 1 if answer.has_ended else 0
        silent = now - self._silent_since
        silent -= self.suspensions.seconds_in(silent)
        is_silent = silent >= self.ring_timeout / 2 and place.seconds >= self.ring_timeout
        if self._found_dead > 1 or is_silent:
            self._suspect = self.following

    def _end_after_suspension(self, seconds: float, error: RuntimeError) -> None:
        """Leave to be started again: torch's limits count the time of a suspension."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = RingStalled(
            f"{self.intercom.own} was suspended for {seconds:.0f} s, which torch counts as time that a collective has "
            f"waited: {reason}"
        )
        print(f"\n{type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
        os._exit(RingStalled.exit_code)

    def _end(self) -> None:
        try:
            self._speak()
        except Exception:  # whatever fails here must not leave the job hanging
            traceback.print_exc()
        time.sleep(_SECONDS_TO_SPEAK)
        os._exit(RingStalled.exit_code)  # the main thread cannot be told: it waits in torch

    def _speak(self) -> None:
        if not self._told:
            self.intercom.alarm(self._suspect)
        place = self.read()
        first = self._suspect if place.waits_for == NO_RANK else place.waits_for
        fault = RingStalled(report(self.intercom.own, place, self.intercom.waits_from(first)))
        print(f"\n{type(fault).__name__}: {fault}", file=sys.stderr, flush=True)


def report(own: Member, place: Place, waits: dict[Member, Place | NoAnswer]) -> str:
    """One line: where this process is, what of the next in the chain of ``waits``, and at whom the chain ends."""
    asked = list(waits.items())
    (first, of_first), (last, of_last) = asked[0], asked[-1]
    clauses = [f"{own} {place}"]
    if first != own:
        clauses.append(f"{first} {_told(of_first)}")
    if isinstance(of_last, Place) and of_last.waits_for != NO_RANK:
        clauses.append(f"these waits close in a circle of {len(waits)} ranks")
    elif last != first:
        clauses.append(f"the chain of waits ends at {last}, which {_told(of_last)}")
    return "; ".join(clauses)


def _told(found: Place | NoAnswer) -> str:
    return f"lives and {found}" if isinstance(found, Place) else str(found)
