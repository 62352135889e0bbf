"""Who runs where: the rank, host and process id by which the self-test names a process, and ranks in words."""

import itertools
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

_HOSTS_NAMED = 3


class Process(NamedTuple):
    """One rank of the run."""

    global_rank: int
    host: str
    pid: int

    @staticmethod
    def here(global_rank: int) -> "Process":
        return Process(global_rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.global_rank} ({self.host}, process {self.pid})"


def in_words(processes: Sequence[Process]) -> str:
    """Processes in rank order, with their hosts, few or counted: ``"ranks 0-2, 5 (node1, node2)"``."""
    hosts = sorted({process.host for process in processes})
    where = ", ".join(hosts) if len(hosts) <= _HOSTS_NAMED else f"{len(hosts)} hosts"
    return f"rank{'s' * (len(processes) > 1)} {_runs([process.global_rank for process in processes])} ({where})"


def _runs(ranks: Sequence[int]) -> str:
    """Increasing numbers, neighbours put together.

    >>> _runs([0, 1, 2, 5])
    '0-2, 5'
    """
    grouped = itertools.groupby(enumerate(ranks), key=lambda found: found[1] - found[0])
    runs = [[rank for _, rank in group] for _, group in grouped]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
