"""What Linux states of a process in /proc. On other systems no process is found there."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcStat:
    """A process, as /proc/PID/stat has it.

    state: R, S, D, T, Z and so on. start: when it began, in clock ticks after the boot; pid and
    start together identify a process, since a pid is reused.
    """

    pid: int
    state: str
    parent: int
    start: int

    @property
    def has_ended(self) -> bool:
        """Whether only its exit code is left, for its parent to fetch."""
        return self.state in "ZX"

    @staticmethod
    def read(pid: int) -> "ProcStat | None":
        """Return what is known of the process ``pid``; None where there is none."""
        try:
            content = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name, in parentheses before these fields, may contain anything.
        fields = content.rpartition(b")")[2].split()
        return ProcStat(pid, fields[0].decode(), int(fields[1]), int(fields[19]))
