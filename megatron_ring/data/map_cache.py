"""A cache of memory maps that stays under the process's limit on open files.

A memory map holds one file descriptor, Python's own duplicate of the one it was made from. A blend
may have more stores than a process may have open files (often 1,024), so the maps that were read
least recently are closed and opened again when they are needed.
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

# Maps may use 1 / 4 of the limit; the rest is for libraries: sockets, pipes, devices, checkpoints.
_LIMIT_DIVISOR = 4


@dataclass(frozen=True)
class FileState:
    """The properties by which a reopened file is recognized as unchanged."""

    size: int
    modified_ns: int

    @staticmethod
    def of(file: str | Path) -> "FileState":
        """Return the current state of ``file``. Raises OSError."""
        status = os.stat(file)
        return FileState(status.st_size, status.st_mtime_ns)


class MapCache:
    """Read-only memory maps by path, at most ``limit`` of them open. Thread-safe.

    The memory of a map that the cache closes stays valid until the last array over it is gone.
    """

    def __init__(self, limit: int | None = None):
        """``limit`` is by default a quarter of the process's open-file limit."""
        self._limit = limit or max(1, open_files_limit() // _LIMIT_DIVISOR)
        self._maps: OrderedDict[str, tuple[mmap.mmap, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Return the number of open maps."""
        return len(self._maps)

    def map(self, file: str, state: FileState, dtype: np.dtype) -> tuple[mmap.mmap, np.ndarray]:
        """Return the map of ``file`` and its content as an array of ``dtype``.

        ``state`` is the file's state when it was first opened. Raises DataError where the file
        cannot be opened, or has to be reopened and has changed since.
        """
        with self._lock:
            entry = self._maps.get(file)
            if entry is None:
                mapped = self._open(file, lambda: _open_map(file))
                _refuse_changed(file, state)
                entry = mapped, np.frombuffer(mapped, dtype)
                self._maps[file] = entry
                while len(self._maps) > self._limit:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(file)
            return entry

    def read(self, file: str | Path, read: Callable[[], Result]) -> Result:
        """Return ``read()``, which opens ``file``.

        At the open-file limit all maps are closed and ``read`` is called again. Raises DataError
        with the remedy where that does not help, or the file cannot be read.
        """
        with self._lock:
            return self._open(file, read)

    def _open(self, file: str | Path, read: Callable[[], Result]) -> Result:
        try:
            return read()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise _unreadable(file, error) from error
        # Other code opened more files than expected: close the maps, which can be opened again.
        self._maps.clear()
        with readable(file):
            return read()


def open_files_limit() -> int:
    """Return how many files this process may have open at a time."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


@contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Turn an OSError raised inside into a DataError with the file's name and the remedy."""
    try:
        yield
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str | Path, error: OSError) -> DataError:
    if error.errno == errno.EMFILE:
        limit = open_files_limit()
        return DataError(
            f"{file} cannot be opened: this process has reached its limit of {limit} open files. "
            f"Raise the limit before the start (ulimit -n {max(4096, 4 * limit)}; SLURM: "
            "--propagate=NOFILE; Docker: --ulimit nofile=), or name fewer token stores in "
            "--data-path."
        )
    return DataError(f"{file} cannot be read: {error.strerror or error}. Set --data-path.")


def _open_map(file: str) -> mmap.mmap:
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _refuse_changed(file: str, state: FileState) -> None:
    with readable(file):
        current = FileState.of(file)
    if current != state:
        raise DataError(
            f"{file} was rewritten while it was in use: {current.size} bytes now and {state.size} "
            "when it was first opened, or a different modification time. Start the run again, and "
            "rewrite a store that is being read under a different --output-prefix."
        )
