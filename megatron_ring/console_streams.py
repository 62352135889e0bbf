"""Replacements for sys.stdout and sys.stderr whose writes do not fail when nothing reads them.

After ``| head``, or when a terminal is lost, the descriptor is led to /dev/null, so that libraries
which write to it do not fail either. Tools survive a reader that has gone and nothing else: output
that a full disk cuts is an error of theirs. Runs survive every error.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

# On a full disk there may be room later; a reader that has gone, or a terminal, does not come back.
_MAY_RECOVER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Lossy(io.RawIOBase):
    """Writes to a descriptor, which stays open when this is closed.

    survives_all: no write raises, and the loss of stdout is reported once on stderr. Otherwise only
    a reader that has gone is survived, in silence.
    """

    def __init__(self, descriptor: int, name: str, survives_all: bool):
        self._descriptor, self.name, self.mode = descriptor, name, "wb"
        self._survives_all = survives_all

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
                if not self._survives_all and error.errno != errno.EPIPE:
                    raise
                if error.errno not in _MAY_RECOVER:
                    self._discard(error)
                return size
        return size

    def _discard(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        if self._survives_all and self.name == "<stdout>":
            lost = f"stdout           lost: {error.strerror}; the run continues without it"
            print(lost, file=sys.stderr, flush=True)


def writes_directly(stream: TextIO | None) -> bool:
    """Whether ``stream`` writes to a descriptor as Python has opened it, and not for a test."""
    buffer = getattr(stream, "buffer", None)
    return type(getattr(buffer, "raw", buffer)) is io.FileIO


def lossy(stream: TextIO, survives_all: bool) -> TextIO:
    """Return a stream in the place of ``stream``, which writes to a descriptor (see ``_Lossy``)."""
    with contextlib.suppress(OSError if survives_all else BrokenPipeError):
        stream.flush()
    raw = _Lossy(stream.fileno(), stream.name, survives_all)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
