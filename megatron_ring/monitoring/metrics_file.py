"""The file of --metrics-file: one JSON object a line, whole lines only, every step once, over kills
and restarts.

    metrics.jsonl             the lines of the run, in the order of its steps
    metrics.jsonl.superseded  lines that a resume or a roll back took out: the steps are run again
    metrics.jsonl.1, .2, ...  files of earlier runs, moved to a free name by a run from step 0

A resumed run cuts the file after its checkpoint's step. It truncates instead of rewriting: the
lines to drop are the last ones, so there is no moment at which a kill could lose another line, and
it works on a full disk. Files that are not regular (/dev/stdout, a pipe) are only written to.
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

# How each line begins, and how a torn first line can be recognised.
_BEGINNING = b'{"step": '
_BLOCK = 1 << 16
# A longer line is not one of ours: a step with --profile-ring has some 130 bytes a hop of the ring.
_LONGEST_LINE = 1 << 24


class MetricsFile:
    """Writes a run's metrics file. Every method may raise OSError, and a later call tries again
    what is left to do.

    report: is called with each line that the user should read.
    """

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path, self._report = path, report
        self._to_do: list[Callable[[], None]] = []

    def begin(self, steps_done: int) -> None:
        """Prepare the file for the step after ``steps_done``; at 0, an earlier run's file is moved
        out of the way.
        """
        self._to_do.append(partial(self._cut_after, steps_done) if steps_done else self._move_aside)
        self._catch_up()

    def rewind_to(self, step: int) -> None:
        """Take the lines after ``step`` out, into the file of superseded lines."""
        self._to_do.append(partial(self._cut_after, step))
        self._catch_up()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, or nothing: a write that fails half way is taken back. What is not finite
        becomes null.
        """
        self._catch_up()
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        with _opened(self.path, create=True) as file:
            if _is_regular(file):
                _cut_torn_line(file)
            _append(file, [line])

    def flush(self) -> None:
        """Block until the disk holds all lines, so that a checkpoint never outlives those of its
        steps.
        """
        if self.path.is_file():
            disk.flush(self.path)
            disk.flush(self.path.parent)

    def _catch_up(self) -> None:
        while self._to_do:  # in this order: a run that goes back has an earlier one's file to move
            disk.make_folder(self.path.parent)
            self._to_do[0]()
            del self._to_do[0]

    def _move_aside(self) -> None:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        aside = _reserved(self.path)
        try:
            os.replace(self.path, aside)
        except OSError:
            aside.unlink()
            raise
        disk.flush(aside.parent)
        self._report(
            f"metrics          {self.path} had the lines of an earlier run, which are in {aside} "
            "now: this run begins at step 1 (--load continues an earlier one)"
        )

    def _cut_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        notes = []
        with _opened(self.path) as file:
            size = os.fstat(file).st_size
            whole, _ = _end_of_step(file, size, math.inf)
            keep, last_step = _end_of_step(file, whole, step)
            if whole < size:
                notes.append(
                    f"{self.path} ended in half a line, as a kill or a full disk leaves it: "
                    f"its {size - whole} bytes are dropped"
                )
            if keep < whole:
                kept = self._superseded(file, keep, whole)
                notes.append(f"the lines after step {step} are {kept}")
            if keep < size:
                os.ftruncate(file, keep)
                os.fsync(file)
        if last_step is not None and last_step < step:
            notes.append(f"{self.path} has no lines of steps {last_step + 1} to {step}")
        for note in notes:
            self._report(f"metrics          {note}")

    def _superseded(self, file: int, start: int, end: int) -> str:
        """Copy these lines to the file of superseded ones, unless it ends with them; returns what
        became of them.
        """
        superseded = self.path.with_name(f"{self.path.name}.superseded")
        try:
            with _opened(superseded, create=True) as copy:
                _cut_torn_line(copy)
                if not _ends_with(copy, file, start, end):
                    _append(copy, _blocks(file, start, end))
                    os.fsync(copy)
            disk.flush(superseded.parent)
        except OSError as error:  # these steps are run again, so their new lines matter more
            return f"dropped, because they could not be copied: {error}"
        return f"in {superseded} now: these steps are run again"


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file in its order, without lines that are none; raises OSError.
    Reads line by line.
    """
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if (record := _record(line)) is not None:
                yield record


def problem(path: Path) -> str | None:
    """Why ``path``, which exists, cannot be a metrics file; None if it can. Raises OSError if it
    cannot be read.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "is a folder"
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        return "is a socket or a disk"
    if not stat.S_ISREG(mode):
        return None
    with path.open("rb") as file:
        first = file.readline(_LONGEST_LINE)
    torn = first.startswith(_BEGINNING) or _BEGINNING.startswith(first)
    if torn or _record(first) is not None:
        return None
    return 'has other content than metrics: its first line is not {"step": ...}'


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _reserved(path: Path) -> Path:
    """A new empty file ``path``.1, .2, ...: exclusive creation, so that no two runs take the same
    name.
    """
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.{number}")
        try:
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
            return aside
        except FileExistsError:
            number += 1


@contextmanager
def _opened(path: Path, create: bool = False) -> Iterator[int]:
    """A descriptor for appending, and for reading where that makes sense; a pipe without a reader
    does not block.
    """
    regular = path.is_file() or not path.exists()
    flags = (os.O_RDWR if regular else os.O_WRONLY) | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags | (os.O_CREAT if create else 0), 0o666)
    try:
        yield file
    finally:
        os.close(file)


def _is_regular(file: int) -> bool:
    return stat.S_ISREG(os.fstat(file).st_mode)


def _append(file: int, blocks: Iterable[bytes]) -> None:
    """Append all blocks; if one cannot be written, take back what was and raise OSError."""
    size = os.fstat(file).st_size
    try:
        for block in blocks:
            while block:
                block = block[os.write(file, block) :]
    except OSError:
        if _is_regular(file):
            os.ftruncate(file, size)
        raise


def _cut_torn_line(file: int) -> None:
    size = os.fstat(file).st_size
    if (whole := _whole_lines(file, size)) < size:
        os.ftruncate(file, whole)


def _whole_lines(file: int, size: int) -> int:
    """Bytes from the beginning up to the last end of a line."""
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    return _start_of_line(file, size)


def _end_of_step(file: int, end: int, step: float) -> tuple[int, int | None]:
    """Where the last line up to ``step`` ends, and its step; looks from ``end`` backwards.

    Lines that are torn or cannot be read are passed over.
    """
    while end:
        start = _start_of_line(file, end)
        line = os.pread(file, end - start, start) if end - start <= _LONGEST_LINE else b""
        record = _record(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= step:
            return end, record["step"]
        end = start
    return 0, None


def _start_of_line(file: int, end: int) -> int:
    """Where the line begins that ends at ``end``, with or without its newline."""
    at = end - 1
    while at > 0:
        begin = max(0, at - _BLOCK)
        found = os.pread(file, at - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        at = begin
    return 0


def _blocks(file: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (block := os.pread(file, min(_BLOCK, end - start), start)):
        yield block
        start += len(block)


def _ends_with(copy: int, file: int, start: int, end: int) -> bool:
    """Whether ``copy`` ends with these bytes of ``file``: they were copied before, but not cut."""
    size, length = os.fstat(copy).st_size, end - start
    pairs = zip(_blocks(copy, size - length, size), _blocks(file, start, end))
    return size >= length and all(copied == own for copied, own in pairs)
