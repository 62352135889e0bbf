"""Recording a trace: each rank keeps the logs of a few steps, and rank 0 gathers and writes them.

The ranks' clocks are aligned with rank 0's by Cristian's method (1989): a rank requests rank 0's
time, which was read somewhere between the request and the response. The fastest of several round
trips gives the tightest bound.
"""

import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ring.errors import counted
from megatron_ring.monitoring.outputs import describe_error
from megatron_ring.monitoring.ring_profile.trace import ClockOffset, RankLog, StepLog, as_json
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.untrusted import replace_file

# The first steps of a process pay one-time costs and are not recorded.
_SKIPPED_STEPS = 2
_ROUND_TRIPS = 16


class TraceRecorder:
    """Keeps the logs of ``steps`` steps, from the process's third on, and writes the trace.

    Every method is collective over all processes.
    """

    def __init__(self, file: str, steps: int, consensus: Consensus):
        self._file = Path(file)
        self._consensus = consensus
        self._to_skip = _SKIPPED_STEPS
        self._to_record = steps
        self._logs: list[StepLog] = []

    def add(self, log: StepLog) -> list[str]:
        """Record a step; after the last one, write the trace.

        Returns the console lines about the trace on rank 0, and none elsewhere.
        """
        if self._to_skip:
            self._to_skip -= 1
            return []
        if not self._to_record:
            return []
        self._to_record -= 1
        self._logs.append(log)
        return [] if self._to_record else self._write()

    def finish(self) -> list[str]:
        """Write the trace of a run that ended before its last recorded step; returns as ``add``."""
        if self._to_record == 0:
            return []
        if not self._logs:
            return [
                "ring trace       not written: recording starts at the third step, and the run "
                "ended before it"
            ]
        return self._write()

    def _write(self) -> list[str]:
        offset = clock_offset(self._consensus)
        own = RankLog(self._consensus.rank, socket.gethostname(), offset, self._logs)
        gathered = [None] * self._consensus.ranks if own.rank == 0 else None
        dist.gather_object(own, gathered, group=self._consensus.group, group_dst=0)
        if gathered is None:
            return []
        try:
            replace_file(self._file, as_json(gathered).encode())
        except Exception as error:  # a failed trace must not end the run
            return [
                f"ring trace       not written: {self._file}: {describe_error(error)}. "
                "Set --profile-ring-trace."
            ]
        return [
            f"ring trace       {self._file}, {counted(len(self._logs), 'step')}; open it in "
            "https://ui.perfetto.dev"
        ]


def clock_offset(consensus: Consensus) -> ClockOffset:
    """Measure how far this process's clock is from rank 0's.

    Collective and blocking: rank 0 serves the other ranks one after another.
    """
    if consensus.rank:
        offsets = [_request_time(consensus) for _ in range(_ROUND_TRIPS)]
        return min(offsets, key=lambda offset: offset.error)
    for other in range(1, consensus.ranks):
        for _ in range(_ROUND_TRIPS):
            _send_time(other, consensus)
    return ClockOffset(0, 0)


def _request_time(consensus: Consensus) -> ClockOffset:
    rank_0_time = torch.zeros(1, dtype=torch.int64)
    requested = time.monotonic_ns()
    dist.send(rank_0_time, group=consensus.group, group_dst=0)
    dist.recv(rank_0_time, group=consensus.group, group_src=0)
    received = time.monotonic_ns()
    midpoint = (requested + received) // 2
    error = (received - requested + 1) // 2
    return ClockOffset(int(rank_0_time) - midpoint, error)


def _send_time(other: int, consensus: Consensus) -> None:
    request = torch.zeros(1, dtype=torch.int64)
    dist.recv(request, group=consensus.group, group_src=other)
    dist.send(torch.tensor([time.monotonic_ns()]), group=consensus.group, group_dst=other)
