"""The few steps of which a trace is kept, on all ranks, and its file, which rank 0 writes once they are over."""

import socket
from pathlib import Path

import torch.distributed as dist

from megatron_ring.data.replace_file import replace_file
from megatron_ring.monitoring.outputs import reason
from megatron_ring.monitoring.ring_profile.clocks import offset_to_rank_0
from megatron_ring.monitoring.ring_profile.trace import RankLog, StepLog, as_json
from megatron_ring.parallel.consensus import Consensus

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
