"""The metrics file: complete JSON lines only, and each step once, across kills and restarts.

    metrics.jsonl             the lines of the run, in the order of its steps
    metrics.jsonl.superseded  lines removed by a resume or a roll back, which repeats their steps
    metrics.jsonl.1, .2, ...  files of earlier runs, renamed by a run that starts from step 0

A resumed run truncates the file after its checkpoint's step. It does not rewrite the file: the
lines to drop are the last ones, so a kill at any moment loses no other line, and truncation works
on a full disk. Files that are not regular (/dev/stdout, a pipe) are only written to.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint import disk
from megatron_ring.errors import counted

# The beginning of every line, by which an incomplete first line is recognised.
_BEGINNING = b'{"step": '
_BLOCK_BYTES = 1 << 16
# A longer line was not written here: a step with --profile-ring has about 130 bytes a hop.
_MAX_LINE_BYTES = 1 << 24


class MetricsFile:
    """Writes a run's metrics file.

    Every method may raise OSError. Renaming or truncation that failed is retried before the next
    line. report: called with each message for the user.
    """

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path = path
        self._report = report
        self._pending: list[Callable[[], None]] = []

    def begin(self, steps_done: int) -> None:
        """Prepare the file for the step after ``steps_done``; 0: rename an earlier run's file."""
        if steps_done:
            self._pending.append(partial(self._truncate_after, steps_done))
        else:
            self._pending.append(self._rename_earlier)
        self._run_pending()

    def rewind_to(self, step: int) -> None:
        """Move the lines after ``step`` to the file of superseded lines."""
        self._pending.append(partial(self._truncate_after, step))
        self._run_pending()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, with null for non-finite values; a partial write is undone."""
        self._run_pending()
        line = json.dumps(_without_non_finite(record), allow_nan=False).encode() + b"\n"
        with _opened(self.path, create=True) as file:
            if _is_regular(file):
                _truncate_incomplete_line(file)
            _append(file, [line])

    def flush(self) -> None:
        """Block until all lines are on disk, so that no checkpoint has a step without its line."""
        if self.path.is_file():
            disk.flush(self.path)
            disk.flush(self.path.parent)

    def _run_pending(self) -> None:
        # In order: before a roll back, an earlier run's file must have been renamed.
        while self._pending:
            disk.make_folder(self.path.parent)
            self._pending[0]()
            del self._pending[0]

    def _rename_earlier(self) -> None:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        new_name = _reserve_name(self.path)
        try:
            os.replace(self.path, new_name)
        except OSError:
            new_name.unlink()
            raise
        disk.flush(new_name.parent)
        self._report(
            f"metrics          the file of an earlier run, {self.path}, is now {new_name}: this "
            "run starts at step 1 (--load continues an earlier one)"
        )

    def _truncate_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        notes = []
        with _opened(self.path) as file:
            size = os.fstat(file).st_size
            complete, _ = _end_of_step(file, size, math.inf)
            keep, last_step = _end_of_step(file, complete, step)
            if complete < size:
                notes.append(
                    f"{self.path} ended in an incomplete line, as after a kill or on a full disk; "
                    f"what is left of it ({counted(size - complete, 'byte')}) is dropped"
                )
            if keep < complete:
                outcome = self._copy_superseded(file, keep, complete)
                notes.append(f"the steps after {step} are run again; their lines {outcome}")
            if keep < size:
                os.ftruncate(file, keep)
                os.fsync(file)
        if last_step is not None and last_step < step:
            notes.append(f"{self.path} has no lines for steps {last_step + 1} to {step}")
        for note in notes:
            self._report(f"metrics          {note}")

    def _copy_superseded(self, file: int, start: int, end: int) -> str:
        """Copy a range of lines to the file of superseded lines, unless it ends with them.

        Returns the outcome, for the user.
        """
        superseded = self.path.with_name(f"{self.path.name}.superseded")
        try:
            with _opened(superseded, create=True) as copy:
                _truncate_incomplete_line(copy)
                if not _ends_with(copy, file, start, end):
                    _append(copy, _blocks(file, start, end))
                    os.fsync(copy)
            disk.flush(superseded.parent)
        except OSError as error:  # not fatal: the steps are run again and write new lines
            return f"are dropped, because they could not be copied: {error}"
        return f"are now in {superseded}"


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in order, skipping other lines.

    Reads line by line. Raises OSError.
    """
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            if (record := _record(line)) is not None:
                yield record


def problem(path: Path) -> str | None:
    """Return why the existing ``path`` cannot be a metrics file, or None if it can.

    Raises OSError if it cannot be read.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "is a folder"
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        return "is a socket or a block device"
    if not stat.S_ISREG(mode):
        return None
    with path.open("rb") as file:
        first = file.readline(_MAX_LINE_BYTES)
    may_be_incomplete = first.startswith(_BEGINNING) or _BEGINNING.startswith(first)
    if may_be_incomplete or _record(first) is not None:
        return None
    return 'has other content than metrics: its first line is not {"step": ...}'


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _reserve_name(path: Path) -> Path:
    """Create an empty file ``path``.1, .2, ...; exclusively, so that no two runs use one name."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    number = 1
    while True:
        reserved = path.with_name(f"{path.name}.{number}")
        try:
            os.close(os.open(reserved, flags, 0o666))
            return reserved
        except FileExistsError:
            number += 1


@contextmanager
def _opened(path: Path, create: bool = False) -> Iterator[int]:
    """Open a descriptor for appending, and for reading if the file is regular.

    Does not block on a pipe without a reader.
    """
    is_regular = path.is_file() or not path.exists()
    flags = os.O_RDWR if is_regular else os.O_WRONLY
    flags |= os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    if create:
        flags |= os.O_CREAT
    file = os.open(path, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _is_regular(file: int) -> bool:
    return stat.S_ISREG(os.fstat(file).st_mode)


def _append(file: int, blocks: Iterable[bytes]) -> None:
    """Append all blocks; if one cannot be written, undo the others and raise OSError."""
    size = os.fstat(file).st_size
    try:
        for block in blocks:
            while block:
                block = block[os.write(file, block) :]
    except OSError:
        if _is_regular(file):
            os.ftruncate(file, size)
        raise


def _truncate_incomplete_line(file: int) -> None:
    size = os.fstat(file).st_size
    complete = _complete_lines(file, size)
    if complete < size:
        os.ftruncate(file, complete)


def _complete_lines(file: int, size: int) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return _start_of_line(file, size)


def _end_of_step(file: int, end: int, step: float) -> tuple[int, int | None]:
    """Return the end of the last line up to ``step``, and its step, searching back from ``end``.

    Lines that are incomplete or invalid are skipped.
    """
    while end:
        start = _start_of_line(file, end)
        line = os.pread(file, end - start, start) if end - start <= _MAX_LINE_BYTES else b""
        record = _record(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= step:
            return end, record["step"]
        end = start
    return 0, None


def _start_of_line(file: int, end: int) -> int:
    """Return the start of the line that ends at ``end``, with or without its newline."""
    at = end - 1
    while at > 0:
        begin = max(0, at - _BLOCK_BYTES)
        newline = os.pread(file, at - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        at = begin
    return 0


def _blocks(file: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (block := os.pread(file, min(_BLOCK_BYTES, end - start), start)):
        yield block
        start += len(block)


def _ends_with(copy: int, file: int, start: int, end: int) -> bool:
    """Return whether ``copy`` ends with these bytes of ``file``.

    This is the case after a kill between copying and truncating.
    """
    size = os.fstat(copy).st_size
    length = end - start
    if size < length:
        return False
    pairs = zip(_blocks(copy, size - length, size), _blocks(file, start, end))
    return all(copied == original for copied, original in pairs)
