"""The few steps of which a trace is kept, on all ranks, and its file, which rank 0 writes once they are over."""

import socket
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ring.data.replace_file import replace_file
from megatron_ring.monitoring.outputs import reason
from megatron_ring.monitoring.ring_profile.trace import RankLog, StepLog, as_json
from megatron_ring.parallel.consensus import Consensus

# How far every process's clock is from rank 0's, so that moments of several nodes lie on one line.
#
# Rank 0 replies with its time, somewhere between request and response (Cristian 1989). The quickest of many
# answers bounds it best.
#

_QUESTIONS = 16


class Offset(NamedTuple):
    """What to add to time.monotonic_ns() of a process to have rank 0's, and by how much that may be wrong."""

    nanoseconds: int
    error: int


def offset_to_rank_0(consensus: Consensus) -> Offset:
    """Of this process. Collective: rank 0 answers the others one after another."""
    if consensus.rank:
        return min((_ask(consensus) for _ in range(_QUESTIONS)), key=lambda offset: offset.error)
    for other in range(1, consensus.ranks):
        for _ in range(_QUESTIONS):
            _answer(other, consensus)
    return Offset(0, 0)


def _ask(consensus: Consensus) -> Offset:
    told = torch.zeros(1, dtype=torch.int64)
    asked = time.monotonic_ns()
    dist.send(told, group=consensus.group, group_dst=0)
    dist.recv(told, group=consensus.group, group_src=0)
    heard = time.monotonic_ns()
    return Offset(int(told) - (asked + heard) // 2, (heard - asked + 1) // 2)


def _answer(other: int, consensus: Consensus) -> None:
    question = torch.zeros(1, dtype=torch.int64)
    dist.recv(question, group=consensus.group, group_src=other)
    dist.send(torch.tensor([time.monotonic_ns()]), group=consensus.group, group_dst=other)


# In its first steps a process touches much for the first time, and a trace is of what comes after.
_STEPS_BEFORE = 2


class Recorder:
    """Keeps the logs of ``steps`` steps, from the third of this process on. Every method is collective.

    ring: the global ranks of this process's.
    """

    def __init__(self, file: str, steps: int, ring: list[int], consensus: Consensus):
        self._file, self._ring, self._consensus = Path(file), ring, consensus
        self._before, self._after = _STEPS_BEFORE, steps
        self._logs: list[StepLog] = []

    def keep(self, log: StepLog) -> list[str]:
        """What to say on rank 0: where the trace is, once this was its last step."""
        if self._before:
            self._before -= 1
        elif self._after:
            self._after -= 1
            self._logs.append(log)
            return [] if self._after else self._written()
        return []

    def finish(self) -> list[str]:
        """The same of a run that ended before."""
        if self._after == 0:
            return []
        if not self._logs:
            return [
                "ring trace       none: it begins with the third step of a run, and there was no third"
            ]
        return self._written()

    def _written(self) -> list[str]:
        offset = offset_to_rank_0(self._consensus)
        own = RankLog(self._consensus.rank, socket.gethostname(), offset, self._ring, self._logs)
        of_all = [None] * self._consensus.ranks if own.rank == 0 else None
        dist.gather_object(own, of_all, group=self._consensus.group, group_dst=0)
        if of_all is None:
            return []
        try:
            replace_file(self._file, as_json(of_all).encode())
        except Exception as error:  # a run is worth more than its picture
            why = f"{self._file}: {reason(error)}"
            return [f"ring trace       not written: {why}. Set --profile-ring-trace."]
        return [
            f"ring trace       {self._file}, {len(self._logs)} steps; https://ui.perfetto.dev opens it"
        ]
