"""The lease on a folder of checkpoints: at most one run writes to it at a time.

    SAVE/.lease-00000003    the run that holds the folder, or that held it last

The file with the highest number is the lease. A run acquires the folder by creating the next
number with O_EXCL, which every file system, including shared ones without locks, grants to one
process only; then it deletes the lower numbers. Only the holder writes to its file, through the
descriptor that it keeps open, and it marks the lease as released when it ends. The highest number
is never deleted, so numbers only rise, and a run that was suspended finds a higher number, even if
the run that took over has ended.

A number has exactly eight digits; other names are not leases. There is no number after the largest
one, so the next run is refused until a user has deleted that file.

The file can be replaced while its run is alive, for example by a copy or a folder when a backup is
restored, and an entry that is not a lease can get a higher number. The holder then creates a lease
with the number after the highest and continues with that. It accepts another run as its successor
only if that run's lease file is a valid lease, or one that it has no permission to read.

The holder rewrites its file with an increasing count. Another run polls the file for a change and
measures time on its own clock: clocks of two hosts are never compared. A lease that stays unchanged
for LOOKS polls is taken over. It is taken over at once if its process has ended on this host, or if
it belongs to an earlier start of the same SLURM job.

A run can be suspended between any two lines here, so before it writes a checkpoint, and again
before it publishes it, the holder checks that the lease is still its own. Nothing here communicates
with other processes of the run: global rank 0 holds the lease for all ranks.
"""

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_ring.checkpoint import disk, lease_file
from megatron_ring.checkpoint.lease_file import LARGEST_NUMBER, LeaseFile, Owner, Record, newest
from megatron_ring.errors import CheckpointError

RENEWAL_SECONDS = 5.0
"""Seconds between two renewals of a lease, and between two polls of another run's lease."""

LOOKS = 12
"""Polls of an unchanged lease before it is taken over: twelve missed renewals, one minute."""

# A run writes its lease right after creating the file, so it is readable after this delay.
_SECOND_READ_SECONDS = 0.2

Report = Callable[[str], None]


def take(
    folder: Path,
    owner: Owner,
    report: Report = print,
    looks: int = LOOKS,
    seconds: float = RENEWAL_SECONDS,
) -> "Lease":
    """Acquire the lease on ``folder`` and renew it until it is released.

    Creates ``folder`` if it is missing. Blocks while it is unclear whether another run still holds
    the folder: for up to ``looks`` polls, ``seconds`` apart. Raises CheckpointError if another run
    holds the folder or if the folder is not writable.
    """
    with disk.write_errors(folder):
        disk.make_folder(folder)
        while True:
            before = newest(folder)
            if before and not _is_free(folder, before, owner, report, looks, seconds):
                continue  # the lease has changed hands in the meantime
            if before and before.number == LARGEST_NUMBER:
                raise CheckpointError(
                    f"{lease_file.path_of(folder, before.number)} has the largest possible lease "
                    "number, so no further run can use this folder. If no run writes to it, delete "
                    "that file, or set --save to another folder."
                )
            lease = Lease.create(folder, before.number + 1 if before else 1, owner)
            if lease is None:
                continue  # another run created this number first
            # An outdated directory listing (NFS) may have led to a number that is too low.
            if max(lease_file.numbers(folder), default=lease.number) > lease.number:
                lease.withdraw()
                continue
            lease_file.delete_below(folder, lease.number)
            lease.keep_renewing(seconds)
            return lease


def check_not_held(
    folder: Path, report: Report = print, looks: int = LOOKS, seconds: float = RENEWAL_SECONDS
) -> None:
    """Raise CheckpointError if a run holds ``folder``, for tools that write to it once.

    Blocks as ``take`` does.
    """
    owner = Owner.here()
    with disk.write_errors(folder):
        while folder.is_dir() and (current := newest(folder)):
            if _is_free(folder, current, owner, report, looks, seconds):
                return


def _is_free(
    folder: Path, current: LeaseFile, owner: Owner, report: Report, looks: int, seconds: float
) -> bool:
    """Return True once the lease ``current`` may be taken over, False if another one replaced it.

    Raises CheckpointError if its run is alive.
    """
    for poll in range(looks):
        if current.is_released:
            return True
        record = current.record
        if record and record.owner.is_earlier_start_of(owner):
            report(f"lease            {folder} was held by an earlier start of this job: {current}")
            return True
        state = record.owner.state_seen_from(owner) if record else None
        if state == "":
            report(f"lease            {folder} was held by a process that has ended: {current}")
            return True
        # A stopped process (T) or one in uninterruptible sleep (D) may never continue.
        if state and state in "RSI":
            raise _in_use(folder, current)
        if poll == 0:
            report(
                f"lease            {folder} was last held by {current}. Waiting up to "
                f"{looks * seconds:.0f} s to see whether that run still renews its lease"
            )
        time.sleep(seconds)
        again = newest(folder)
        if again is None or again.number != current.number:
            return False
        if again.signature != current.signature and not again.is_released:
            raise _in_use(folder, again)
        current = again
    report(
        f"lease            {folder} was held by a run that did not renew it for "
        f"{looks * seconds:.0f} s: {current}"
    )
    return True


def _in_use(folder: Path, holder: LeaseFile) -> CheckpointError:
    return CheckpointError(
        f"another run writes to {folder}: {holder}. Two runs in one folder would delete each "
        "other's checkpoints. Stop that run, wait until it has ended, or set --save to another "
        "folder."
    )


class Lease:
    """A lease that this process holds until ``release``, or until another run takes it over.

    Thread-safe.
    """

    def __init__(self, folder: Path, number: int, record: Record, descriptor: int):
        self.folder = folder
        self.number = number
        self._record = record
        self._descriptor = descriptor
        self._successor: LeaseFile | None = None
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    @staticmethod
    def create(folder: Path, number: int, owner: Owner) -> "Lease | None":
        """Create the lease file ``number``; returns None if it exists.

        Raises OSError if it cannot be written.
        """
        record = Record(owner)
        try:
            descriptor = lease_file.create(lease_file.path_of(folder, number))
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
        """Whether another run is known to have taken the lease over. Reads no file."""
        return self._successor is not None

    def raise_if_lost(self) -> None:
        """Raise CheckpointError if another run is known to have taken the lease over.

        Reads no file.
        """
        if self._successor:
            raise CheckpointError(
                f"this run no longer holds {self.folder}: {self._successor} has taken it over "
                "after this run was suspended or could not renew its lease. This run writes no "
                "further checkpoint, because that would damage the other run's. Stop one of the "
                "two; --load continues from the newest checkpoint, and --save with another folder "
                "keeps the runs apart."
            )

    def check(self) -> None:
        """Read the folder, and raise CheckpointError if another run has taken the lease over.

        A folder that cannot be read proves nothing; writing the checkpoint will fail there anyway.
        """
        with self._lock, contextlib.suppress(OSError):
            self._update()
        self.raise_if_lost()

    def renew(self) -> None:
        """Write one more renewal, unless the lease is lost.

        A disk that is full or read-only is reported once.
        """
        with self._lock:
            if self._ending.is_set():
                return
            try:
                self._update()
                if not self.lost:
                    self._write(replace(self._record, renewals=self._record.renewals + 1))
            except OSError as error:
                self._warn_once(error)

    def keep_renewing(self, seconds: float) -> None:
        """Renew every ``seconds`` seconds in a daemon thread, however long a step takes."""
        self._thread = threading.Thread(
            target=self._renew_until_ending, args=(seconds,), name="lease", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        """Mark the lease as released, so that the next run can take it at once.

        A second call has no effect.
        """
        if self._ending.is_set():
            return
        self._ending.set()
        # A renewal that hangs on a lost disk must not keep the process from ending.
        if not self._lock.acquire(timeout=RENEWAL_SECONDS):
            return
        with contextlib.suppress(OSError):
            # If the lease is lost, this only reaches the deleted file of this run.
            self._write(replace(self._record, released=True))
        os.close(self._descriptor)
        self._lock.release()

    def withdraw(self) -> None:
        """Delete the file of a lease that did not come into force."""
        self._ending.set()
        lease_file.discard(self._descriptor, lease_file.path_of(self.folder, self.number))

    def _renew_until_ending(self, seconds: float) -> None:
        while not self._ending.wait(seconds) and not self.lost:
            self.renew()

    def _warn_once(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        print(
            f"warning: the lease on {self.folder} cannot be renewed: {error.strerror}. The run "
            "continues. If this persists, another run started with the same --save may take over "
            "the folder.",
            file=sys.stderr,
            flush=True,
        )

    def _update(self) -> None:
        """Find a successor if there is one; otherwise ensure that this run's file is the lease.

        A lease file that a user has deleted is written again. If there are entries with a higher
        number that are not leases, or a copy in place of the file, a lease with a higher number is
        created, which blocks for a fraction of a second. Raises OSError.
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
            time.sleep(_SECOND_READ_SECONDS)
            others = self._others()
        self._successor = self._successor_of(others)
        if others and not self._successor:
            self._continue_as(others[-1].number + 1)

    def _others(self) -> list[LeaseFile]:
        """Return the entries with this lease's number or a higher one that are not its own file."""
        others = []
        for number in sorted(lease_file.numbers(self.folder)):
            if number > self.number or (number == self.number and not self._is_in_place()):
                with contextlib.suppress(FileNotFoundError):
                    others.append(lease_file.read(self.folder, number))
        return others

    def _successor_of(self, others: list[LeaseFile]) -> LeaseFile | None:
        of_other_runs = [file for file in others if file.is_of_another(self._record.owner.run)]
        return of_other_runs[-1] if of_other_runs else None

    def _is_in_place(self) -> bool:
        """Return whether the lease's name still refers to the file that this run writes to."""
        try:
            status = lease_file.path_of(self.folder, self.number).lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(self._descriptor))

    def _continue_as(self, number: int) -> None:
        """Create the lease ``number`` and hold that one instead, unless another run was faster."""
        if number > LARGEST_NUMBER:
            blocking = lease_file.path_of(self.folder, number - 1)
            raise OSError(errno.EOVERFLOW, f"{blocking} is not a lease; delete it")
        path = lease_file.path_of(self.folder, number)
        try:
            descriptor = lease_file.create(path)
        except FileExistsError:
            return  # the next poll shows what it is
        try:
            lease_file.write(descriptor, self._record)
            disk.flush(self.folder)
            # A run may have completed one of the lower leases since they were read.
            self._successor = self._successor_of(self._others())
        except OSError:
            self._successor = None
            lease_file.discard(descriptor, path)
            raise
        if self._successor:
            lease_file.discard(descriptor, path)
            return
        os.close(self._descriptor)
        self._descriptor = descriptor
        self.number = number
        lease_file.delete_below(self.folder, number)
        print(
            f"warning: the lease file of this run in {self.folder} was replaced, or an entry that "
            f"is not a lease had a higher number. The run continues with {path.name}.",
            file=sys.stderr,
            flush=True,
        )

    def _create_again(self) -> None:
        """Write the deleted file again.

        If the folder is gone as well, the next save creates both again.
        """
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            descriptor = lease_file.create(lease_file.path_of(self.folder, self.number))
            os.close(self._descriptor)
            self._descriptor = descriptor
            self._write(self._record)

    def _write(self, record: Record) -> None:
        lease_file.write(self._descriptor, record)
        self._record = record
