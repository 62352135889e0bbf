"""Identity of processes: a rank's host and pid for messages, and where and when a pid is valid.

A pid refers to one process only within a boot of the host and a pid namespace, and together with
the start time of the process, because pids are reused.
"""

import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_MAX_HOSTS_LISTED = 3


class ProcessId(NamedTuple):
    """One rank of the run."""

    global_rank: int
    host: str
    pid: int

    @staticmethod
    def here(global_rank: int) -> "ProcessId":
        """Return the identity of this process."""
        return ProcessId(global_rank, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        """Format as ``"rank 5 (node1, process 4242)"``."""
        return f"rank {self.global_rank} ({self.host}, process {self.pid})"


def describe_processes(processes: Sequence[ProcessId]) -> str:
    """Format processes in rank order, with their hosts, as ``"ranks 0-2, 5 (node1, node2)"``.

    More than three hosts are only counted.
    """
    hosts = sorted({process.host for process in processes})
    where = ", ".join(hosts) if len(hosts) <= _MAX_HOSTS_LISTED else f"{len(hosts)} hosts"
    ranks = _ranges([process.global_rank for process in processes])
    return f"rank{'s' * (len(processes) > 1)} {ranks} ({where})"


def _ranges(ranks: Sequence[int]) -> str:
    """Format increasing numbers, with consecutive ones as a range.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    # Consecutive numbers have the same difference to their index.
    grouped = itertools.groupby(enumerate(ranks), key=lambda indexed: indexed[1] - indexed[0])
    runs = [[rank for _, rank in group] for _, group in grouped]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def boot_id() -> str:
    """Return the random id of this boot of this host; empty if it is unknown, as outside Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def namespace_id(kind: str) -> str:
    """Return the id of this process's "pid" or "net" namespace, unique within a boot of the host.

    Empty if it is unknown. Containers have namespaces of their own.
    """
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""


@dataclass(frozen=True)
class ProcStat:
    """The state of a process of this host, from Linux's /proc/PID/stat.

    Attributes:
        state: R, S, D, T, Z and so on.
        parent: pid of the parent.
        start: start time in clock ticks since boot. pid and start together identify a process,
            because pids are reused.
    """

    pid: int
    state: str
    parent: int
    start: int

    @property
    def has_ended(self) -> bool:
        """Whether only its exit code is left, for its parent to collect."""
        return self.state in "ZX"

    @staticmethod
    def read(pid: int) -> "ProcStat | None":
        """Return the state of process ``pid``; None without such a process, or without /proc."""
        try:
            content = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name, in parentheses before these fields, may contain anything.
        fields = content.rpartition(b")")[2].split()
        return ProcStat(pid, fields[0].decode(), int(fields[1]), int(fields[19]))

    @staticmethod
    def read_running(pid: int, start: int) -> "ProcStat | None":
        """Return the state of the process that started at ``start``; None if it has ended."""
        process = ProcStat.read(pid)
        if process is None or process.start != start or process.has_ended:
            return None
        return process
