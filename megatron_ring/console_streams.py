"""Replacements for sys.stdout and sys.stderr whose writes do not fail when the reader is gone.

After ``| head``, or when a terminal is lost, the descriptor is redirected to /dev/null, so that
libraries which write to it do not fail either. Tools survive a closed reader only: output truncated
by a full disk is an error. Runs survive every error.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

# A full disk may have space later; a closed reader or a lost terminal does not come back.
_MAY_RECOVER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _TolerantWriter(io.RawIOBase):
    """A raw stream over a descriptor, which stays open when the stream is closed.

    survives_all: no write raises, and the loss of stdout is reported once on stderr. Otherwise only
    a closed reader is survived, silently.
    """

    def __init__(self, descriptor: int, name: str, survives_all: bool):
        self._descriptor = descriptor
        self.name = name
        self.mode = "wb"
        self._survives_all = survives_all

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        while remaining:
            try:
                remaining = remaining[os.write(self._descriptor, remaining) :]
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
            message = f"stdout           lost: {error.strerror}; the run continues without it"
            print(message, file=sys.stderr, flush=True)


def is_original(stream: TextIO | None) -> bool:
    """Return whether ``stream`` is as Python opened it, and not replaced, as by a test."""
    buffer = getattr(stream, "buffer", None)
    return type(getattr(buffer, "raw", buffer)) is io.FileIO


def tolerant_stream(stream: TextIO | None, survives_all: bool) -> TextIO:
    """Return a replacement for ``stream`` whose writes do not fail (see ``_TolerantWriter``).

    ``stream`` is None if it was closed before this process started, as by ``>&-``.
    """
    if stream is None:
        return open(os.devnull, "w")
    with contextlib.suppress(OSError if survives_all else BrokenPipeError):
        stream.flush()
    raw = _TolerantWriter(stream.fileno(), stream.name, survives_all)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
