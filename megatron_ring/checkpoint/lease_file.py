"""Lease files: their names and contents, and the identity of the process that holds a lease.

    SAVE/.lease-00000003    the lease with number 3; the highest number is the one in force

lease.py has the protocol that these files serve: how a run acquires, renews and loses a lease.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ring.checkpoint.names import LEASE
from megatron_ring.checkpoint.provenance import now
from megatron_ring.parallel.process_id import ProcStat, boot_id, namespace_id
from megatron_ring.untrusted import UntrustedInputError, parse_json, read_bytes

LARGEST_NUMBER = 99_999_999
# A constant size, so that a renewal never changes the length of the file.
_FILE_BYTES = 1024
_NAME = re.compile(re.escape(LEASE) + "([0-9]{8})")


@dataclass(frozen=True)
class Owner:
    """A process that holds a lease, or is about to acquire one, as another process can identify it.

    All fields are written to the lease file. run: a random id of this run. process_start: start
    time of the process in clock ticks since boot; it distinguishes a process from a later one with
    the same pid. boot_id, pid_namespace: pids are comparable only where both are known and equal,
    which they need not be for two containers on one host. slurm_restarts: how often the SLURM job
    was requeued. started_at: UTC.
    """

    run: str
    host: str
    pid: int
    process_start: int
    boot_id: str
    pid_namespace: str
    slurm_job: str
    slurm_restarts: int
    started_at: str

    @staticmethod
    def here(slurm_job: str = "", slurm_restarts: int = 0) -> "Owner":
        """Return this process as the owner of a new lease."""
        this_process = ProcStat.read(os.getpid())
        return Owner(
            run=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=this_process.start if this_process else 0,
            boot_id=boot_id(),
            pid_namespace=namespace_id("pid"),
            slurm_job=slurm_job,
            slurm_restarts=slurm_restarts,
            started_at=now(),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        text = f"host {self.host}, pid {self.pid}{job}, started {self.started_at} UTC"
        return "".join(character if character.isprintable() else "?" for character in text)

    def state_seen_from(self, other: "Owner") -> str | None:
        """Return the state letter of this process in /proc, "" if it has ended.

        Returns None if ``other`` cannot see it because it is on another host or in another
        container.
        """
        if not self.boot_id or not self.pid_namespace:
            return None
        if (self.boot_id, self.pid_namespace) != (other.boot_id, other.pid_namespace):
            return None
        process = ProcStat.read_running(self.pid, self.process_start)
        return process.state if process else ""

    def is_earlier_start_of(self, other: "Owner") -> bool:
        """Return whether SLURM has requeued this owner's job and ``other`` is of the later start.

        The job id alone proves nothing, because two steps of one start may run side by side.
        """
        same_job = self.slurm_job != "" and self.slurm_job == other.slurm_job
        return same_job and self.slurm_restarts < other.slurm_restarts


@dataclass(frozen=True)
class Record:
    """The content of a lease file. renewals: how often the owner has renewed the lease."""

    owner: Owner
    renewals: int = 0
    released: bool = False

    def encode(self) -> bytes:
        """Return the record as JSON, padded to the constant size of a lease file."""
        text = json.dumps(asdict(self), indent=2)
        return text.encode().ljust(_FILE_BYTES - 1) + b"\n"


@dataclass(frozen=True)
class LeaseFile:
    """A lease file as it was read. record: None if the content is not a valid lease.

    signature: content and modification time; every renewal changes at least one of them.
    denied: whether this user has no permission to read the file, so that it may be a valid lease.
    """

    number: int
    record: Record | None
    signature: tuple[bytes, int]
    denied: bool = False

    @property
    def is_released(self) -> bool:
        """Whether the owner has marked the lease as released."""
        return self.record is not None and self.record.released

    def is_of_another(self, run: str) -> bool:
        """Return whether this is, or may be, the lease of another run than ``run``."""
        if self.record is None:
            return self.denied
        return self.record.owner.run != run

    def __str__(self) -> str:
        return str(self.record.owner) if self.record else "a run whose lease file cannot be read"


def newest(folder: Path) -> LeaseFile | None:
    """Return the lease on ``folder``, released or not; None if there never was one.

    Raises OSError.
    """
    for number in sorted(numbers(folder), reverse=True):
        # A file deleted since the folder was listed belongs to a lease that was taken over.
        with contextlib.suppress(FileNotFoundError):
            return read(folder, number)
    return None


def numbers(folder: Path) -> list[int]:
    """Return the numbers of the lease files in ``folder``; none if the folder is missing."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def path_of(folder: Path, number: int) -> Path:
    """Return the path of the lease file ``number``."""
    return folder / f"{LEASE}{number:08d}"


def read(folder: Path, number: int) -> LeaseFile:
    """Read a lease file. Raises FileNotFoundError.

    Anything else that is wrong with the file leaves its owner unknown.
    """
    path = path_of(folder, number)
    status = path.lstat()
    content = b""
    record = None
    denied = False
    if stat.S_ISREG(status.st_mode):
        try:
            content = read_bytes(path, limit=4 * _FILE_BYTES)
            record = parse_json(content, Record)
        except PermissionError:
            denied = True
        except UntrustedInputError:
            pass
    # The modification time also shows renewals of a file that this user may not read.
    return LeaseFile(number, record, (content, status.st_mtime_ns), denied)


def create(path: Path) -> int:
    """Create a lease file and return its descriptor. Raises FileExistsError if it exists."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write(descriptor: int, record: Record) -> None:
    """Write ``record`` at the start of an open lease file and flush it. Raises OSError."""
    content = record.encode()
    if os.pwrite(descriptor, content, 0) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def discard(descriptor: int, path: Path) -> None:
    """Close and delete a lease file that this process has created."""
    os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()


def delete_below(folder: Path, below: int) -> None:
    """Delete the lease files with a number lower than ``below``."""
    for number in numbers(folder):
        if number < below:
            with contextlib.suppress(OSError):
                path_of(folder, number).unlink()
