"""Memory maps of many files under the limit on open files: a map that has not been read for a while
is closed.

A map holds one descriptor, Python's own copy of the one it was made from. A blend may have more
stores than a process may have files open (often 1,024), so those that were read least recently are
closed and opened again when needed.
"""

import errno
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np

from megatron_ring.errors import DataError

Result = TypeVar("Result")

# The rest is for the libraries: sockets, pipes, devices, checkpoints.
_SHARE_OF_LIMIT = 4


@dataclass(frozen=True)
class FileState:
    """What a file must still be when it is opened again."""

    size: int
    modified_ns: int

    @staticmethod
    def of(file: str | Path) -> "FileState":
        """The state of ``file`` now. Raises OSError."""
        found = os.stat(file)
        return FileState(found.st_size, found.st_mtime_ns)


class OpenMaps:
    """Read-only maps by their path, of which at most ``limit`` are kept open. Safe to use from
    several threads.

    A map that is closed here lives on until the last array over it is gone.
    """

    def __init__(self, limit: int | None = None):
        """``limit``: maps kept open; without it a quarter of the open files that this process may
        have."""
        self._limit = limit or max(1, open_files_limit() // _SHARE_OF_LIMIT)
        self._maps: OrderedDict[str, tuple[mmap.mmap, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Maps that are kept open."""
        return len(self._maps)

    def map(self, file: str, state: FileState, dtype: np.dtype) -> tuple[mmap.mmap, np.ndarray]:
        """The map of ``file``, which was of ``state`` when it was opened first, and its content in
        ``dtype``.

        Raises DataError where it cannot be opened, or has to be opened again and has changed since.
        """
        with self._lock:
            if (found := self._maps.get(file)) is None:
                mapped = self._read(file, lambda: _mapped(file))
                _refuse_changed(file, state)
                found = self._maps[file] = mapped, np.frombuffer(mapped, dtype)
                while len(self._maps) > self._limit:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(file)
            return found

    def read(self, file: str | Path, read: Callable[[], Result]) -> Result:
        """Return ``read()``, which opens ``file``; at the limit on open files all maps are closed first.

        Raises DataError with the remedy where that does not help, or the file cannot be read.
        """
        with self._lock:
            return self._read(file, read)

    def _read(self, file: str | Path, read: Callable[[], Result]) -> Result:
        try:
            return read()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise _unreadable(file, error) from error
        # Something else took more files than expected: close what can be opened again.
        self._maps.clear()
        with readable(file):
            return read()


def open_files_limit() -> int:
    """Files that this process may have open at a time."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


@contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Raises DataError with the remedy where ``file`` cannot be opened or read within."""
    try:
        yield
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str | Path, error: OSError) -> DataError:
    if error.errno == errno.EMFILE:
        limit = open_files_limit()
        return DataError(
            f"{file} cannot be opened: this process has the {limit} files open that it may have. Raise the limit "
            f"before the start (ulimit -n {max(4096, 4 * limit)}; under SLURM: --propagate=NOFILE; Docker: --ulimit "
            "nofile=), or name fewer token stores in --data-path."
        )
    return DataError(f"{file} cannot be read: {error.strerror or error}. Set --data-path.")


def _mapped(file: str) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _refuse_changed(file: str, state: FileState) -> None:
    with readable(file):
        found = FileState.of(file)
    if found != state:
        raise DataError(
            f"{file} was written again while it was in use: {found.size} bytes now and {state.size} when it was first "
            "opened, or another time of change. Start the run again, and write a store that is being read under "
            "another --output-prefix."
        )
