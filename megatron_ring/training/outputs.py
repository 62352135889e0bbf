"""What a run writes for people and not for itself: checked before it starts, and never a reason for
it to end.

These are the metrics file and its plot, the monitors, the trace of a ring and the console. A path
that cannot work is refused at the start. What fails later (a full disk, a lost pipe) is reported
once and the run continues without it.
"""

import contextlib
import errno
import importlib.util
import io
import logging
import os
import select
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from megatron_ring.config import LoggingConfig
from megatron_ring.errors import ConfigError, flag
from megatron_ring.training import metrics_file

T = TypeVar("T")


class BestEffort:
    """Calls what may fail without ending the run, and reports the first failure of each kind on the
    console.

    failures: how many calls of each kind have failed.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def __call__(self, what: str, act: Callable[..., T], *args: Any) -> T | None:
        """The result of ``act``, or None if it raised. ``what``: the output that fails then, as a
        user would name it.
        """
        try:
            return act(*args)
        except Exception as error:
            self.failures[what] += 1
            if self.failures[what] == 1:
                tqdm.write(f"warning          {what} failed, the run continues: {reason(error)}")
            return None


def reason(error: Exception) -> str:
    """One line for an error: the system's words for a file, else its kind and its first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# ---- before the start ----


def check(logging: LoggingConfig) -> None:
    """Raise ConfigError for every output that is known to be impossible; writes nothing. For rank
    0, which writes.
    """
    found = [
        _file_problem("metrics_file", logging.metrics_file),
        _file_problem("profile_ring_trace", logging.profile_ring_trace),
        _folder_problem("tensorboard_dir", logging.tensorboard_dir),
        _folder_problem("csv_dir", logging.csv_dir),
        _library_problem("tensorboard_dir", logging.tensorboard_dir, "tensorboard"),
        _library_problem("wandb_project", logging.wandb_project, "wandb"),
    ]
    if problems := [problem for problem in found if problem]:
        raise ConfigError(problems)


def _file_problem(name: str, value: str) -> str | None:
    why = _why_not(Path(value), folder=False, content=name == "metrics_file") if value else None
    return f"{name} {value} {why}. Set {flag(name)} to another file." if why else None


def _folder_problem(name: str, value: str) -> str | None:
    why = _why_not(Path(value), folder=True) if value else None
    return f"{name} {value} {why}. Set {flag(name)} to another folder." if why else None


def _library_problem(name: str, value: str, library: str) -> str | None:
    if not value:
        return None
    found = importlib.util.find_spec(library)
    if found and found.origin:  # a folder of that name, as wandb makes one, has no origin
        return None
    return (
        f"{name} {value} needs {library}, which is not installed. Install it "
        f"(pip install 'megatron_ring[monitor]'), or leave {flag(name)} out."
    )


def _why_not(path: Path, folder: bool, content: bool = False) -> str | None:
    """Why nothing can be written to ``path``, or made there; None if it can as far as that is
    known.

    content: whether an existing file must be a metrics file.
    """
    try:
        there = next(each for each in (path, *path.absolute().parents) if _exists(each))
        if there != path:
            if not there.is_dir():
                return f"cannot be made: {there} is not a folder"
            if not os.access(there, os.W_OK | os.X_OK):
                return f"cannot be made: no permission to write to {there}"
            return None
        if there.is_dir() != folder:
            return "is not a folder" if folder else "is a folder"
        if not os.access(there, os.W_OK | (os.X_OK if folder else os.R_OK)):
            return "cannot be used: no permission to read and write it"
        return metrics_file.problem(there) if content else None
    except (OSError, ValueError) as error:
        return f"cannot be used: {reason(error)}"


def _exists(path: Path) -> bool:
    """Raises OSError for what can never exist, as a name that is too long; a link without a target
    is followed.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


# ---- the console ----


def keep_console_from_ending_the_run() -> None:
    """Make sys.stdout and sys.stderr drop what cannot be written, as after ``| head`` or on a full
    disk.

    Their descriptors then lead to /dev/null, so that libraries which write to them do not fail
    either.
    """
    sys.stdout = _tolerant(sys.stdout)
    sys.stderr = _tolerant(sys.stderr)


def _tolerant(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed before this process started
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Tolerant(stream.fileno(), stream.name)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    tolerant = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", [])):
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            handler.setStream(tolerant)
    return tolerant


class _Tolerant(io.RawIOBase):
    """Writes to a descriptor, which stays open when this is closed. No write raises."""

    def __init__(self, descriptor: int, name: str):
        self._descriptor, self.name, self.mode = descriptor, name, "wb"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                # On a full disk there may be room later; a reader that has gone, or a terminal,
                # does not come back.
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    self._discard(error)
                return size
        return size

    def _discard(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        if self.name == "<stdout>":
            lost = f"stdout           lost: {error.strerror}; the run continues without it"
            print(lost, file=sys.stderr, flush=True)
