"""The watchdog: turns a stall of the ring into a diagnosis by every rank and the end of the job.

A thread checks once a second how long this process has waited for another rank of its ring. After
``--ring-timeout``, or as soon as such a rank is lost, it alarms all other processes. Each of them
prints one line with its own progress, the rank that it waits for and the end of the chain of waits,
and exits with the code of RingStalled, so that the job can be restarted. Only waits in the ring
count.

A process that has been outside the ring for long, in computation, a checkpoint or an all-reduce,
checks whether the next rank of its ring is alive. That rank counts as dead if its process is gone,
or if its host, which was reachable before, refuses the connection. Silence, or a network without a
route, counts only after half of ``--ring-timeout``. While that rank responds, a stall cannot be
distinguished from work, and is left to torch's own timeout.

Time in which this process was suspended (``scontrol suspend``, ``docker pause``, SIGSTOP) does not
count as waiting. The thread detects it with its own clock, from a second that took longer.

On CUDA the device waits for a transfer and not the host, which soon blocks outside the ring, where
it reads the step's loss. So only the check of the next rank finds a stall: a rank that has ended or
does not respond is named, and all exit with the code of RingStalled (seen on an H100 with a rank
stopped by SIGSTOP). A rank reports what its host has queued, not what its device has reached. Where
all processes respond, torch aborts those that wait once NCCL's timeout is over, a minute after the
same option's (ProcessGroups), and its exit code is that of the abort.
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
from megatron_ring.monitoring.intercom import RESPONSE_TIMEOUT, Intercom, NoResponse, Peer
from megatron_ring.parallel.collectives import ProcessGroups, leave_link_timeouts_to_watchdog
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import NO_RANK, ProgressSnapshot, ProgressTracker

# All in seconds.
_CHECK_INTERVAL = 1.0
_RETRY_INTERVAL = 0.3
# A launcher kills all ranks once one has exited, and an exited rank cannot respond any more. So a
# rank stays up this long after its diagnosis.
_GRACE_PERIOD = 5.0
# By how much a wait or a request may exceed its expected time before it counts as a suspension.
_SUSPENSION_TOLERANCE = 0.5
# A suspension that may have used up torch's timeouts of collectives, the shortest of 10 minutes.
_LONG_SUSPENSION = 300.0
_AFTER_SUSPENSION = 60.0  # a suspension's consequences are expected within this time

_MAX_SUSPENSIONS = 64  # older ones do not matter, because waits are limited


class Suspensions:
    """The intervals in which this process was suspended, detected from waits that took too long.

    ``record`` is called from one thread; all other methods are thread-safe.
    """

    def __init__(self):
        self._intervals: collections.deque[tuple[float, float]] = collections.deque(
            maxlen=_MAX_SUSPENSIONS
        )

    @contextlib.contextmanager
    def detect(self, seconds: float) -> Iterator[None]:
        """Record a suspension if the body, which takes at most ``seconds``, takes longer."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.record(began, time.monotonic(), seconds)

    def record(self, began: float, ended: float, expected: float) -> None:
        """Record what an interval on the monotonic clock took beyond ``expected`` seconds."""
        if ended - began > expected + _SUSPENSION_TOLERANCE:
            self._intervals.append((began + expected, ended))

    def seconds_in(self, seconds: float) -> float:
        """Return for how many of the last ``seconds`` the process was suspended."""
        start = time.monotonic() - seconds
        return sum(max(0.0, ended - max(began, start)) for began, ended in tuple(self._intervals))

    def longest(self, seconds: float) -> float:
        """Return the longest suspension that ended within the last ``seconds``, or 0."""
        start = time.monotonic() - seconds
        durations = [ended - began for began, ended in tuple(self._intervals) if ended >= start]
        return max(durations, default=0.0)


def ring_watchdog(
    progress: ProgressTracker, groups: ProcessGroups, ring_timeout: int, consensus: Consensus
) -> AbstractContextManager:
    """Return a context with a watchdog over ``progress``; an empty one without a ring or timeout.

    Collective over all processes.
    """
    if groups.ring_links is None or not ring_timeout:
        return contextlib.nullcontext()
    leave_link_timeouts_to_watchdog(groups.ring_links)
    ring = dist.get_process_group_ranks(groups.ring_links[0])
    next_rank = ring[(ring.index(consensus.rank) + 1) % len(ring)]
    return Watchdog(progress, next_rank, ring_timeout, consensus)


class Watchdog:
    """A context in which a thread watches this process; the constructor is collective.

    next_rank: the global rank after this one in the ring. ring_timeout: seconds.
    """

    def __init__(
        self,
        progress: ProgressTracker,
        next_rank: int,
        ring_timeout: int,
        consensus: Consensus,
    ):
        self.next_rank = next_rank
        self.ring_timeout = ring_timeout
        self.suspensions = Suspensions()
        self._progress = progress
        self.intercom = Intercom(consensus, self.read, self._on_alarm)
        # The rank that stalls this process, or another one that has alarmed this one.
        self._suspect: int | None = None
        self._is_alarmed = False
        self._is_over = False
        self._next_has_responded = False
        self._silent_since: float | None = None
        self._dead_responses = 0  # in a row
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def read(self) -> ProgressSnapshot:
        """Return this process's progress; its duration excludes suspensions."""
        progress = self._progress.read()
        seconds = progress.seconds - self.suspensions.seconds_in(progress.seconds)
        return progress._replace(seconds=max(0.0, seconds))

    def __enter__(self) -> "Watchdog":
        self._next_has_responded = isinstance(self.intercom.ask(self.next_rank), ProgressSnapshot)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torch raises RuntimeError when a peer is lost, and also when memory is short.
        if isinstance(error, RuntimeError):
            self._exit_if_peer_lost()
            suspended = self.suspensions.longest(_AFTER_SUSPENSION)
            if suspended >= _LONG_SUSPENSION:
                self._exit_after_suspension(suspended, error)
        self._is_over = True
        self._wake.set()
        self._thread.join()
        self.intercom.close()

    def _exit_if_peer_lost(self) -> None:
        """End the process if a rank of the ring is lost, or if a peer's alarm follows shortly."""
        progress = self.read()
        if progress.waits_for != NO_RANK:
            self._suspect = progress.waits_for
        elif self._next_has_responded:
            self._poll_ending_neighbour()
        if self._suspect is not None:
            self._wake.set()
        if self._wake.wait(_GRACE_PERIOD):
            self._thread.join()

    def _poll_ending_neighbour(self) -> None:
        """Suspect the next rank of the ring if it has died or dies within the grace period.

        Polling is needed because a process's connections close before the process is gone.
        """
        deadline = time.monotonic() + _GRACE_PERIOD
        while time.monotonic() < deadline and not self._wake.is_set():
            response = self.intercom.ask(self.next_rank)
            if isinstance(response, ProgressSnapshot):
                return
            if response.has_ended:
                self._suspect = self.next_rank
                return
            self._wake.wait(_RETRY_INTERVAL)

    def _on_alarm(self, suspect: int) -> None:
        self._is_alarmed = True
        self._suspect = suspect
        self._wake.set()

    def _watch(self) -> None:
        while self._suspect is None and not self._wait():
            progress = self.read()
            if progress.waits_for != NO_RANK:
                if progress.seconds >= self.ring_timeout:
                    self._suspect = progress.waits_for
            elif progress.seconds >= self.ring_timeout / 2:
                self._check_next(progress)
        if not self._is_over:
            self._exit_stalled()

    def _wait(self) -> bool:
        """Wait until the next check; returns True if there is to be none."""
        with self.suspensions.detect(_CHECK_INTERVAL):
            return self._wake.wait(_CHECK_INTERVAL)

    def _check_next(self, progress: ProgressSnapshot) -> None:
        """Suspect the next rank of the ring if it is dead or has been silent for too long.

        A dead neighbour is checked again a second later: at the end of a run it may have exited
        just before this process does.
        """
        with self.suspensions.detect(RESPONSE_TIMEOUT):
            response = self.intercom.ask(self.next_rank)
        now = time.monotonic()
        if isinstance(response, ProgressSnapshot):
            self._next_has_responded = True
            self._silent_since = None
            self._dead_responses = 0
            return
        if not self._next_has_responded:
            return  # a rank that never responded may be behind a firewall
        if self._silent_since is None:
            self._silent_since = now
        self._dead_responses = self._dead_responses + 1 if response.has_ended else 0
        silent = now - self._silent_since
        silent -= self.suspensions.seconds_in(silent)
        is_silent = silent >= self.ring_timeout / 2 and progress.seconds >= self.ring_timeout
        if self._dead_responses > 1 or is_silent:
            self._suspect = self.next_rank

    def _exit_after_suspension(self, seconds: float, error: RuntimeError) -> None:
        """Exit for a restart, because torch's timeouts include the time of a suspension."""
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        _print_fault(
            f"{self.intercom.own} was suspended for {seconds:.0f} s, which torch counts towards "
            f"the timeout of a collective: {cause}"
        )
        os._exit(RingStalled.exit_code)

    def _exit_stalled(self) -> None:
        try:
            self._diagnose()
        except Exception:  # no failure here may leave the job hanging
            traceback.print_exc()
        time.sleep(_GRACE_PERIOD)
        # The main thread cannot be interrupted: it waits in torch.
        os._exit(RingStalled.exit_code)

    def _diagnose(self) -> None:
        if not self._is_alarmed:
            self.intercom.report_stall(self._suspect)
        progress = self.read()
        first = self._suspect if progress.waits_for == NO_RANK else progress.waits_for
        _print_fault(report(self.intercom.own, progress, self.intercom.wait_chain(first)))


def _print_fault(message: str) -> None:
    print(f"\n{RingStalled.__name__}: {message}", file=sys.stderr, flush=True)


def report(
    own: Peer, progress: ProgressSnapshot, waits: dict[Peer, ProgressSnapshot | NoResponse]
) -> str:
    """Format the diagnosis: this process, the first peer in ``waits`` and the end of the chain."""
    chain = list(waits.items())
    first, of_first = chain[0]
    last, of_last = chain[-1]
    clauses = [f"{own} {progress}"]
    if first != own:
        clauses.append(f"{first} {_describe(of_first)}")
    ranks = [peer.rank for peer in waits]
    if isinstance(of_last, ProgressSnapshot) and of_last.waits_for in ranks:
        cycle = ranks[ranks.index(of_last.waits_for) :]
        clauses.append(f"deadlock: these {len(cycle)} ranks wait for each other")
    elif last != first:
        clauses.append(f"the chain of waits ends at {last}, which {_describe(of_last)}")
    return "; ".join(clauses)


def _describe(response: ProgressSnapshot | NoResponse) -> str:
    return f"is alive and {response}" if isinstance(response, ProgressSnapshot) else str(response)
