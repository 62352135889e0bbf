"""The lease on a folder of checkpoints: at most one run writes to it at a time.

    SAVE/.lease-00000003    the run that holds the folder, or that held it last

The file with the highest number is the lease. A run takes the folder by creating the next number
with O_EXCL, which every file system, shared ones without locks included, grants to one process
only; then it deletes the lower numbers. The holder alone writes to its file, through the descriptor
that it has open, and marks the lease as released when it ends. The highest number is never deleted,
so numbers only rise, and a run that was suspended finds a higher one, even if that run has ended.

A number has exactly eight digits; other names are no leases. A run with the largest one possible
has no successor: the next run is refused until a user has deleted that file.

The file can be replaced while its run lives, by a copy or a folder as a restore makes them, and an
entry that is no lease can get a higher number. The holder then creates a lease with the number
after the highest and continues with that. It believes in a successor only where it can read one.

The holder rewrites its file with a rising count. Another run watches the file for a change, by its
own clock: clocks of two hosts are never compared. A lease that stays the same for LOOKS looks is
taken over, as one is at once whose process is gone on this host, or that an earlier start of the
same SLURM job has left.

A run can be suspended between any two lines here, so the holder checks before it writes a
checkpoint, and again before it publishes it, that the lease is still its own. Nothing here
communicates with other processes of the run: global rank 0 holds the lease for all.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ring.checkpoint import disk
from megatron_ring.checkpoint.names import LEASE
from megatron_ring.checkpoint.provenance import now
from megatron_ring.errors import CheckpointError
from megatron_ring.parallel.proc_stat import ProcStat
from megatron_ring.untrusted import UntrustedInputError, parse_json, read_bytes

RENEWAL_SECONDS = 5.0
"""The time between two renewals of a lease, and between two looks at the lease of another run."""

LOOKS = 12
"""Looks at an unchanged lease after which it is taken over: twelve missed renewals, one minute."""

# A constant size, so that a renewal never changes the length of the file.
_FILE_BYTES = 1024
_NAME = re.compile(re.escape(LEASE) + "([0-9]{8})")
_LARGEST_NUMBER = 99_999_999
# A run that has created its lease writes it at once, so that it can be read after this time.
_SECOND_LOOK_SECONDS = 0.2

Report = Callable[[str], None]


@dataclass(frozen=True)
class Owner:
    """A process that holds a lease, or wants to, as another process can identify it.

    process_start: when the process began, in clock ticks after the boot; with it a reused pid is
    another process. boot_id, pid_namespace: pids can be compared only where both are the same and
    known, which containers of one host need not be. slurm_restarts: how often its job was requeued.
    started_at: UTC.
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
        """Describe this process, for a new lease."""
        found = ProcStat.read(os.getpid())
        return Owner(
            run=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=found.start if found else 0,
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            slurm_job=slurm_job,
            slurm_restarts=slurm_restarts,
            started_at=now(),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        text = f"host {self.host}, pid {self.pid}{job}, started {self.started_at} UTC"
        return "".join(character if character.isprintable() else "?" for character in text)

    def state_seen_from(self, other: "Owner") -> str | None:
        """Return the state letter of this process in /proc, "" where it has ended.

        Returns None where ``other`` cannot see it: on another host or in another container.
        """
        visible = self.boot_id and self.pid_namespace
        if not visible or (self.boot_id, self.pid_namespace) != (
            other.boot_id,
            other.pid_namespace,
        ):
            return None
        found = ProcStat.read(self.pid)
        return (
            found.state
            if found and found.start == self.process_start and not found.has_ended
            else ""
        )

    def is_earlier_start_of(self, other: "Owner") -> bool:
        """Return whether SLURM has requeued this process's job, and ``other`` is of the later start.

        Two steps of one start may run side by side, so the job's number alone proves nothing.
        """
        same_job = self.slurm_job != "" and self.slurm_job == other.slurm_job
        return same_job and self.slurm_restarts < other.slurm_restarts


@dataclass(frozen=True)
class Record:
    """The content of a lease file. renewals: how often the owner has renewed it."""

    owner: Owner
    renewals: int = 0
    released: bool = False

    def encode(self) -> bytes:
        text = json.dumps(asdict(self), indent=2)
        return text.encode().ljust(_FILE_BYTES - 1) + b"\n"


@dataclass(frozen=True)
class Found:
    """A lease file as it was read. record: None where it is not readable as a lease.

    signature: its content and its time of change, one of which differs after every renewal.
    denied: whether this user has no permission to read it, so that it may be a lease.
    """

    number: int
    record: Record | None
    signature: tuple[bytes, int]
    denied: bool = False

    def is_of_another(self, run: str) -> bool:
        """Return whether this is, or may be, the lease of another run than ``run``."""
        return self.denied if self.record is None else self.record.owner.run != run

    def __str__(self) -> str:
        return str(self.record.owner) if self.record else "a run whose lease file cannot be read"


def newest(folder: Path) -> Found | None:
    """Return the lease on ``folder``, released or not; None where there never was one. Raises OSError."""
    for number in sorted(_numbers(folder), reverse=True):
        # One that was deleted since the folder was listed has been taken over.
        with contextlib.suppress(FileNotFoundError):
            return _read(folder, number)
    return None


def take(
    folder: Path,
    owner: Owner,
    report: Report = print,
    looks: int = LOOKS,
    seconds: float = RENEWAL_SECONDS,
) -> "Lease":
    """Take the lease on ``folder``, which is made if it is missing, and renew it until it is released.

    Blocks while it is not known whether another run still holds the folder: ``looks`` looks, each
    ``seconds`` after the one before. Raises CheckpointError where another run holds the folder, or
    where it cannot be written to.
    """
    with disk.write_errors(folder):
        disk.make_folder(folder)
        while True:
            before = newest(folder)
            if before and not _is_free(folder, before, owner, report, looks, seconds):
                continue  # it has changed hands meanwhile
            if before and before.number == _LARGEST_NUMBER:
                raise CheckpointError(
                    f"{_path(folder, before.number)} has the largest number that a lease can have, so no run can take "
                    "the folder after it. If no run writes there, delete that file, or set --save to another folder."
                )
            lease = Lease.create(folder, before.number + 1 if before else 1, owner)
            if lease is None:
                continue  # another run was faster
            # A list of names that was out of date (NFS) may have given too low a number.
            if max(_numbers(folder), default=lease.number) > lease.number:
                lease.withdraw()
                continue
            _delete_below(folder, lease.number)
            lease.keep_renewing(seconds)
            return lease


def check_not_held(
    folder: Path, report: Report = print, looks: int = LOOKS, seconds: float = RENEWAL_SECONDS
) -> None:
    """Raise CheckpointError where a run holds ``folder``, for tools that write to it once. Blocks as ``take`` does."""
    owner = Owner.here()
    with disk.write_errors(folder):
        while folder.is_dir() and (found := newest(folder)):
            if _is_free(folder, found, owner, report, looks, seconds):
                return


def _is_free(
    folder: Path, found: Found, owner: Owner, report: Report, looks: int, seconds: float
) -> bool:
    """Return True once the lease ``found`` may be taken over, False where another one has replaced it.

    Raises CheckpointError where its run is alive.
    """
    for look in range(looks):
        record = found.record
        if record and record.released:
            return True
        if record and record.owner.is_earlier_start_of(owner):
            report(f"lease            {folder} was held by an earlier start of this job: {found}")
            return True
        state = record.owner.state_seen_from(owner) if record else None
        if state == "":
            report(f"lease            {folder} was held by a process that has ended: {found}")
            return True
        # A stopped process (T) may never go on, and one that waits for a disk (D) may never return.
        if state and state in "RSI":
            raise _in_use(folder, found)
        if look == 0:
            report(
                f"lease            {folder} was last held by {found}. Waiting up to {looks * seconds:.0f} s to see "
                "whether that run still renews its lease"
            )
        time.sleep(seconds)
        again = newest(folder)
        if again is None or again.number != found.number:
            return False
        if again.signature != found.signature and not (again.record and again.record.released):
            raise _in_use(folder, again)
        found = again
    report(
        f"lease            {folder} was held by a run that did not renew it for {looks * seconds:.0f} s: {found}"
    )
    return True


def _in_use(folder: Path, found: Found) -> CheckpointError:
    return CheckpointError(
        f"another run writes to {folder}: {found}. Two runs on one folder delete each other's checkpoints. End that "
        "run, or wait until it has ended, or set --save to another folder."
    )


class Lease:
    """A lease that this process holds until ``release``, or until another run takes it over. Thread-safe."""

    def __init__(self, folder: Path, number: int, record: Record, descriptor: int):
        self.folder, self.number = folder, number
        self._record, self._descriptor = record, descriptor
        self._successor: Found | None = None
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    @staticmethod
    def create(folder: Path, number: int, owner: Owner) -> "Lease | None":
        """Create the lease file ``number``; None where it exists. Raises OSError where it cannot be written."""
        record = Record(owner)
        try:
            descriptor = _create(_path(folder, number))
        except FileExistsError:
            return None
        lease = Lease(folder, number, record, descriptor)
        try:
            lease._write(record)
            disk.flush(folder)
        except OSError:
            lease.withdraw()
            raise
        return lease

    @property
    def lost(self) -> bool:
        """Whether another run was seen to have taken the lease over. Reads no file."""
        return self._successor is not None

    def raise_if_lost(self) -> None:
        """Raise CheckpointError if another run was seen to have taken the lease over. Reads no file."""
        if self._successor:
            raise CheckpointError(
                f"this run no longer holds {self.folder}: {self._successor} has taken it over, after this run was "
                "suspended or could not renew its lease. It writes no further checkpoint, which would damage those of "
                "the other. End one of the two; --load continues from the newest checkpoint, and --save with another "
                "folder keeps them apart."
            )

    def check(self) -> None:
        """Look at the folder, and raise CheckpointError if another run has taken the lease over.

        A folder that cannot be read proves nothing; writing the checkpoint fails there by itself.
        """
        with self._lock, contextlib.suppress(OSError):
            self._look()
        self.raise_if_lost()

    def renew(self) -> None:
        """Count one more renewal, unless the lease is lost. A disk that is full or read-only is reported once."""
        with self._lock:
            if self._ending.is_set():
                return
            try:
                self._look()
                if not self.lost:
                    self._write(replace(self._record, renewals=self._record.renewals + 1))
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    print(
                        f"warning: the lease on {self.folder} cannot be renewed: {error.strerror}. The run goes on. If "
                        f"this lasts, another run that is started with the same --save may take the folder over.",
                        file=sys.stderr,
                        flush=True,
                    )

    def keep_renewing(self, seconds: float) -> None:
        """Renew every ``seconds`` seconds, in a daemon thread, so that the length of a step does not matter."""
        self._thread = threading.Thread(
            target=self._renew_until_ending, args=(seconds,), name="lease", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        """Mark the lease as released, so that the next run takes it at once. A second call has no effect."""
        if self._ending.is_set():
            return
        self._ending.set()
        # A renewal that hangs on a lost disk must not keep the process from ending.
        if not self._lock.acquire(timeout=RENEWAL_SECONDS):
            return
        with contextlib.suppress(OSError):
            # Where the lease is lost this reaches only the deleted file of this run.
            self._write(replace(self._record, released=True))
        os.close(self._descriptor)
        self._lock.release()

    def withdraw(self) -> None:
        """Delete the file of a lease that did not come into force."""
        self._ending.set()
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            _path(self.folder, self.number).unlink()

    def _renew_until_ending(self, seconds: float) -> None:
        while not self._ending.wait(seconds) and not self.lost:
            self.renew()

    def _look(self) -> None:
        """Set the successor if there is one, and make sure that this run's file is the lease otherwise.

        A lease file that somebody has deleted is written again. Above entries that are no leases,
        and above a copy in the place of the file, a lease with a higher number is created. Blocks
        for a fraction of a second then. Raises OSError.
        """
        if self._ending.is_set():
            return
        others = self._others()
        if not others and not self._is_in_place():
            self._create_again()
            others = self._others()
        if not others:
            return
        if not self._successor_of(others):
            time.sleep(_SECOND_LOOK_SECONDS)
            others = self._others()
        self._successor = self._successor_of(others)
        if others and not self._successor:
            self._continue_as(others[-1].number + 1)

    def _others(self) -> list[Found]:
        """List what has this lease's number or a higher one and is not this lease's file."""
        found = []
        for number in sorted(_numbers(self.folder)):
            if number > self.number or (number == self.number and not self._is_in_place()):
                with contextlib.suppress(FileNotFoundError):
                    found.append(_read(self.folder, number))
        return found

    def _successor_of(self, others: list[Found]) -> Found | None:
        theirs = [found for found in others if found.is_of_another(self._record.owner.run)]
        return theirs[-1] if theirs else None

    def _is_in_place(self) -> bool:
        """Return whether the name of the lease still leads to the file that this run writes to."""
        try:
            found = _path(self.folder, self.number).lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._descriptor))

    def _continue_as(self, number: int) -> None:
        """Create the lease ``number`` and hold that instead, unless another run has been faster."""
        if number > _LARGEST_NUMBER:
            raise OSError(
                errno.EOVERFLOW, f"{_path(self.folder, number - 1)} is no lease; delete it"
            )
        path = _path(self.folder, number)
        try:
            descriptor = _create(path)
        except FileExistsError:
            return  # the next look shows what it is
        try:
            _write_record(descriptor, self._record)
            disk.flush(self.folder)
            # A run may have completed one of the lower leases since they were read.
            self._successor = self._successor_of(self._others())
        except OSError:
            self._successor = None
            _discard(descriptor, path)
            raise
        if self._successor:
            _discard(descriptor, path)
            return
        os.close(self._descriptor)
        self._descriptor, self.number = descriptor, number
        _delete_below(self.folder, number)
        print(
            f"warning: the lease file of this run in {self.folder} was replaced, or something that is no lease had a "
            f"higher number. The run goes on with {path.name}.",
            file=sys.stderr,
            flush=True,
        )

    def _create_again(self) -> None:
        """Write the deleted file again, unless the folder is gone, too, which the next save makes again."""
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            descriptor = _create(_path(self.folder, self.number))
            os.close(self._descriptor)
            self._descriptor = descriptor
            self._write(self._record)

    def _write(self, record: Record) -> None:
        _write_record(self._descriptor, record)
        self._record = record


def _write_record(descriptor: int, record: Record) -> None:
    content = record.encode()
    if os.pwrite(descriptor, content, 0) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _discard(descriptor: int, path: Path) -> None:
    os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()


def _delete_below(folder: Path, below: int) -> None:
    for number in _numbers(folder):
        if number < below:
            with contextlib.suppress(OSError):
                _path(folder, number).unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{LEASE}{number:08d}"


def _numbers(folder: Path) -> list[int]:
    """List the numbers of the lease files in ``folder``; none where the folder is missing."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _read(folder: Path, number: int) -> Found:
    """Read a lease file. Raises FileNotFoundError; anything else that is wrong with it makes its owner unknown."""
    path = _path(folder, number)
    found = path.lstat()
    content, record, denied = b"", None, False
    if stat.S_ISREG(found.st_mode):
        try:
            content = read_bytes(path, limit=4 * _FILE_BYTES)
            record = parse_json(content, Record)
        except PermissionError:
            denied = True
        except UntrustedInputError:
            pass
    # The time of change also shows renewals of a file that this user may not read.
    return Found(number, record, (content, found.st_mtime_ns), denied)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
