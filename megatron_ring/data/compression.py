"""Reading compressed content: gzip, bzip2, xz and zstd, by the suffix or by the first bytes.

Content is decompressed while it is read, in bounded memory, and only up to a stated multiple of the
compressed size. zstd takes Python 3.14 or the package backports.zstd, the same code for older ones;
a frame with a long window (``zstd --long=31``) takes up to 2 GiB for each file that is being read.
"""

import bz2
import gzip
import importlib
import io
import lzma
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Protocol

from megatron_ring.data.file_formats import HEAD_BYTES, split_name
from megatron_ring.errors import DataError

LARGEST_RATIO = 1000
"""Text compresses 2 to 100 times; what expands further is taken for a decompression bomb."""

ALWAYS_ALLOWED_BYTES = 1 << 30
"""What any file may expand to, however small it is: a short text repeated is no attack."""

_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_ZSTD_LONGEST_WINDOW_LOG = 31
_READ_AT_ONCE = 1 << 16

# Skippable zstd frames have magic numbers of their own, 0x184D2A50 to 0x184D2A5F.
_MAGIC = {
    b"\x1f\x8b\x08": ".gz",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    **{bytes([0x50 + n, 0x2A, 0x4D, 0x18]): ".zst" for n in range(16)},
}
_BZIP2_MAGIC = b"BZh", b"1AY&SY"


class ExpansionLimit:
    """Counts what the file ``name`` of ``compressed_bytes`` has expanded to.

    One limit counts every level of decompression: an archive, its members, and what they hold.
    """

    def __init__(self, name: str, compressed_bytes: int):
        self._name, self._compressed, self._expanded = name, compressed_bytes, 0
        self._allowed = max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * compressed_bytes)

    def count(self, expanded: int) -> None:
        """Add so many bytes. Raises DataError beyond the limit."""
        self._expanded += expanded
        if self._expanded > self._allowed:
            raise DataError(
                f"{self._name} expands to more than {self._allowed:,} bytes from {self._compressed:,}, as "
                f"decompression bombs do: at most {LARGEST_RATIO:,} times its size is read, or "
                f"{ALWAYS_ALLOWED_BYTES:,} bytes. Leave it out of --input, or decompress it yourself."
            )


def expansion_limit(file: Path) -> ExpansionLimit:
    """The limit on all that is expanded from ``file``. Raises DataError when there is no such file."""
    with readable(str(file)):
        return ExpansionLimit(str(file), file.stat().st_size)


@contextmanager
def opened(file: Path, limit: ExpansionLimit | None = None) -> Iterator[io.BufferedReader]:
    """The content of ``file``, decompressed; ``peek()`` gives its first HEAD_BYTES.

    What it expands to is counted by ``limit``, by one of its own without. Raises DataError when it
    cannot be read, is damaged, or expands beyond the limit.
    """
    with readable(str(file)), file.open("rb", HEAD_BYTES) as raw:
        own = ExpansionLimit(str(file), os.fstat(raw.fileno()).st_size)
        yield decompressed(raw, str(file), split_name(file.name)[1], limit or own)


def decompressed(
    raw: io.BufferedReader, name: str, suffix: str, limit: ExpansionLimit
) -> io.BufferedReader:
    """The content of ``raw``, whose name ends with ``suffix`` if it is that of a compression.

    What it expands to is counted by ``limit``.
    """
    if not (compression := suffix or compression_of(raw.peek())):
        return raw
    source = _DECOMPRESSORS[compression](raw, name)
    return io.BufferedReader(Limited(source, limit), HEAD_BYTES)


def compression_of(head: bytes) -> str:
    """The suffix of the compression that content beginning with ``head`` has, "" for none."""
    if head.startswith(_BZIP2_MAGIC[0]) and head[4:10] == _BZIP2_MAGIC[1]:
        return ".bz2"
    if not head.startswith(tuple(_MAGIC)):
        return ""
    return next(suffix for magic, suffix in _MAGIC.items() if head.startswith(magic))


def needed(package: str, name: str) -> ModuleType:
    """The optional module ``package``, which ``name`` cannot be read without, or DataError."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{name} is read with {package}, which is not installed. Install it with pip install "
            "'megatron_ring[data]', or leave the file out of --input."
        ) from error


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Errors of reading ``name`` as DataError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise damaged(name, error) from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{name} cannot be read: {reason}. Set --input.") from error


def damaged(name: str, reason: object) -> DataError:
    """The error for a file whose content is not what its format says."""
    return DataError(f"{name} is damaged: {reason}. Fetch it again, or leave it out of --input.")


class Limited(io.RawIOBase):
    """``source`` read through a limit on how much it expands to. Fills what it is given."""

    def __init__(self, source: BinaryIO, limit: ExpansionLimit):
        self._source, self._limit = source, limit

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        filled = 0
        while filled < len(into) and (found := self._source.read(len(into) - filled)):
            into[filled : filled + len(found)] = found
            filled += len(found)
        self._limit.count(filled)
        return filled


class _Decompressor(Protocol):
    """What bz2, lzma and zstd have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Streams:
    """Compressed streams one after another, as parallel compressors and cat write them.

    Unlike the file classes of the standard library it refuses what follows a stream and is none,
    where those end there as if it were the end of the file.
    """

    def __init__(self, raw: BinaryIO, name: str, new: Callable[[], _Decompressor], error: type):
        self._raw, self._name, self._new, self._error = raw, name, new, error
        self._stream = new()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, none at the end."""
        while True:
            data = b""
            if self._stream.eof:
                # Zeros may follow a stream: xz pads with them, and so do blocks of a tape.
                data = self._stream.unused_data.lstrip(b"\0")
                while not data:
                    if not (found := self._raw.read(_READ_AT_ONCE)):
                        return b""
                    data = found.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input and not (data := self._raw.read(_READ_AT_ONCE)):
                raise damaged(self._name, "it ends before its compressed stream does")
            try:
                found = self._stream.decompress(data, size)
            except (self._error, EOFError, MemoryError) as error:
                raise damaged(self._name, error) from error
            if found:
                return found


def _gzip(raw: io.BufferedReader, name: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw)


def _bzip2(raw: io.BufferedReader, name: str) -> _Streams:
    return _Streams(raw, name, bz2.BZ2Decompressor, OSError)


def _xz(raw: io.BufferedReader, name: str) -> _Streams:
    return _Streams(raw, name, lzma.LZMADecompressor, lzma.LZMAError)


def _zstd(raw: io.BufferedReader, name: str) -> _Streams:
    zstd = needed(_ZSTD, name)
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_LONGEST_WINDOW_LOG}
    return _Streams(raw, name, lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError)


_DECOMPRESSORS: dict[str, Callable[[io.BufferedReader, str], BinaryIO | _Streams]] = {
    ".bz2": _bzip2,
    ".gz": _gzip,
    ".lzma": _xz,
    ".xz": _xz,
    ".zst": _zstd,
    ".zstd": _zstd,
}
