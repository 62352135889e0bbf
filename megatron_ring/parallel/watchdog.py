"""The watchdog: a ring in which a rank waits too long is named by every rank, and the job ends to be started again.

A thread looks once a second how long this process has waited for a neighbour in the ring. After ``--ring-timeout``, or
as soon as a neighbour is lost, it tells all other processes. Each of them says in one line where it is, whom it waits
for and at whom the chain of waits ends, and leaves with the exit code of RingStalled. Only a wait in the ring counts.
Who has been elsewhere for as long, computing, saving, or in an all-reduce, asks whether the next of its ring still
lives and answers; while it does, a stall is not told from work, and is left to torch's own limit.

On CUDA, where this has not run, the device waits for a transfer and not the host. What a rank says is then which hop it
has handed to the device, and NCCL's own limit, which ProcessGroups derives from the same option, ends the wait.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from contextlib import AbstractContextManager
from types import TracebackType

import torch.distributed as dist

from megatron_ring.errors import RingStalled
from megatron_ring.parallel.agreement import Agreement
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.intercom import Intercom, Member
from megatron_ring.parallel.whereabouts import NOBODY, Place, Whereabouts

_SECONDS_BETWEEN_LOOKS = 1.0
# A launcher kills all ranks once one has left, and one that has left cannot be asked.
_SECONDS_TO_SPEAK = 5.0


def watched(
    place: Whereabouts, groups: ProcessGroups, ring_timeout: int, agreement: Agreement
) -> AbstractContextManager:
    """What to train within: a watchdog over ``place``, or nothing where there is no ring or no limit. Collective."""
    if groups.ring_links is None or not ring_timeout:
        return contextlib.nullcontext()
    members = dist.get_process_group_ranks(groups.ring_links[0])
    following = members[(members.index(agreement.rank) + 1) % len(members)]
    return Watchdog(place, following, ring_timeout, agreement)


class Watchdog:
    """A watchdog over this process, from entering to leaving. Building it is collective.

    following: the global rank behind this one in the ring; ring_timeout: seconds.
    """

    def __init__(self, place: Whereabouts, following: int, ring_timeout: int, agreement: Agreement):
        self.place = place
        self.following = following
        self.ring_timeout = ring_timeout
        self.intercom = Intercom(agreement, place.read, self._alarmed)
        self._suspect: int | None = None  # who holds this process up, or another that has told of it
        self._told = self._over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RuntimeError):  # what torch raises where a process is lost, and where memory is short
            self._judge()
        self._over = True
        self._wake.set()
        self._thread.join()
        self.intercom.close()

    def _judge(self) -> None:
        """End the process if it lost the next of its ring, or if another one lost its own and says so in a moment."""
        self._look(self.place.read())
        if self._suspect is not None:
            self._wake.set()
        if self._wake.wait(_SECONDS_TO_SPEAK):
            self._thread.join()

    def _alarmed(self, suspect: int) -> None:
        self._told, self._suspect = True, suspect
        self._wake.set()

    def _watch(self) -> None:
        while self._suspect is None and not self._wake.wait(_SECONDS_BETWEEN_LOOKS):
            place = self.place.read()
            if place.seconds >= self.ring_timeout:
                self._look(place)
        if not self._over:
            self._end()

    def _look(self, place: Place) -> None:
        """Suspect whom this process waits for in the ring; elsewhere the next of its ring, if that shows no life."""
        if place.waits_for != NOBODY:
            self._suspect = place.waits_for
        elif isinstance(self.intercom.ask(self.following), str):
            self._suspect = self.following

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
        place = self.place.read()
        first = self._suspect if place.waits_for == NOBODY else place.waits_for
        fault = RingStalled(report(self.intercom.own, place, self.intercom.waits_from(first)))
        print(f"\n{type(fault).__name__}: {fault}", file=sys.stderr, flush=True)


def report(own: Member, place: Place, waits: dict[Member, Place | str]) -> str:
    """One line: where this process is, what of the next in the chain of ``waits``, and at whom the chain ends."""
    asked = list(waits.items())
    (first, of_first), (last, of_last) = asked[0], asked[-1]
    clauses = [f"{own} {place}"]
    if first != own:
        clauses.append(f"{first} {_told(of_first)}")
    if isinstance(of_last, Place) and of_last.waits_for != NOBODY:
        clauses.append(f"these waits close in a circle of {len(waits)} ranks")
    elif last != first:
        clauses.append(f"the chain of waits ends at {last}, which {_told(of_last)}")
    return "; ".join(clauses)


def _told(found: Place | str) -> str:
    return f"lives and {found}" if isinstance(found, Place) else found
