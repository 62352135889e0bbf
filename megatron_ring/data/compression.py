"""Read compressed files: gzip, bzip2, xz and zstd, recognized by suffix or by first bytes.

Content is decompressed while it is read, in bounded memory, and only up to a fixed multiple of the
compressed size. zstd needs Python 3.14 or the package backports.zstd, the same code for older
versions; a frame with a long window (``zstd --long=31``) takes up to 2 GiB of memory per open file.
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
"""The largest allowed expansion. Text compresses 2 to 100 times; anything that expands further is
treated as a decompression bomb."""

ALWAYS_ALLOWED_BYTES = 1 << 30
"""The expanded size allowed for any file, however small: a short text repeated is no attack."""

_ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_ZSTD_LONGEST_WINDOW_LOG = 31
_READ_CHUNK_BYTES = 1 << 16

# Skippable zstd frames have magic numbers of their own, 0x184D2A50 to 0x184D2A5F.
_MAGIC = {
    b"\x1f\x8b\x08": ".gz",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    **{bytes([0x50 + n, 0x2A, 0x4D, 0x18]): ".zst" for n in range(16)},
}
# bzip2's magic has one variable byte, the block size, between these two parts.
_BZIP2_MAGIC = b"BZh", b"1AY&SY"


class ExpansionLimit:
    """Counts the bytes that the file ``name`` of ``compressed_bytes`` has expanded to.

    One limit counts every level of decompression: an archive, its members, and compressed members.
    """

    def __init__(self, name: str, compressed_bytes: int):
        self._name = name
        self._compressed = compressed_bytes
        self._expanded = 0
        self._allowed = max(ALWAYS_ALLOWED_BYTES, LARGEST_RATIO * compressed_bytes)

    def count(self, expanded: int) -> None:
        """Add ``expanded`` bytes. Raises DataError beyond the limit."""
        self._expanded += expanded
        if self._expanded > self._allowed:
            raise DataError(
                f"{self._name} expands to more than {self._allowed:,} bytes from "
                f"{self._compressed:,}, as decompression bombs do; the limit is "
                f"{LARGEST_RATIO:,} times its size or {ALWAYS_ALLOWED_BYTES:,} bytes, whichever is "
                "more. Leave it out of --input, or decompress it yourself."
            )


def expansion_limit(file: Path) -> ExpansionLimit:
    """Create the limit for everything expanded from ``file``. Raises DataError if it is missing."""
    with readable(str(file)):
        return ExpansionLimit(str(file), file.stat().st_size)


@contextmanager
def opened(file: Path, limit: ExpansionLimit | None = None) -> Iterator[io.BufferedReader]:
    """Open ``file`` and yield its decompressed content; ``peek()`` gives its first HEAD_BYTES.

    ``limit`` counts what it expands to, by default a limit of its own. Raises DataError when the
    file cannot be read, is damaged, or expands beyond the limit.
    """
    with readable(str(file)), file.open("rb", HEAD_BYTES) as raw:
        own_limit = ExpansionLimit(str(file), os.fstat(raw.fileno()).st_size)
        yield decompressed(raw, str(file), split_name(file.name)[1], limit or own_limit)


def decompressed(
    raw: io.BufferedReader, name: str, suffix: str, limit: ExpansionLimit
) -> io.BufferedReader:
    """Return the decompressed content of ``raw``; ``limit`` counts what it expands to.

    ``suffix`` is the compression suffix of its name; "" leaves the decision to the first bytes.
    """
    compression = suffix or compression_of(raw.peek())
    if not compression:
        return raw
    source = _DECOMPRESSORS[compression](raw, name)
    return io.BufferedReader(LimitedReader(source, limit), HEAD_BYTES)


def compression_of(head: bytes) -> str:
    """Return the compression suffix for content that begins with ``head``, "" if uncompressed."""
    if head.startswith(_BZIP2_MAGIC[0]) and head[4:10] == _BZIP2_MAGIC[1]:
        return ".bz2"
    for magic, suffix in _MAGIC.items():
        if head.startswith(magic):
            return suffix
    return ""


def needed(package: str, name: str) -> ModuleType:
    """Import the optional ``package``. Raises DataError, since ``name`` cannot be read without."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"{name} is read with {package}, which is not installed. Install it with pip install "
            "'megatron_ring[data]', or leave the file out of --input."
        ) from error


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors raised while ``name`` is read into DataError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise damaged(name, error) from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{name} cannot be read: {reason}. Set --input.") from error


def damaged(name: str, reason: object) -> DataError:
    """Return the error for a file whose content does not match its format."""
    return DataError(f"{name} is damaged: {reason}. Fetch it again, or leave it out of --input.")


class LimitedReader(io.RawIOBase):
    """Reads ``source`` and counts every byte against ``limit``.

    A read fills the buffer it is given unless the source ends.
    """

    def __init__(self, source: BinaryIO, limit: ExpansionLimit):
        self._source = source
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        filled = 0
        while filled < len(into) and (chunk := self._source.read(len(into) - filled)):
            into[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self._limit.count(filled)
        return filled


class _Decompressor(Protocol):
    """The interface that bz2, lzma and zstd share."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ConcatenatedStreams:
    """Reads compressed streams one after another, as parallel compressors and cat write them.

    The file classes of the standard library treat data after a stream that is not another stream as
    the end of the file; this class raises DataError instead.
    """

    def __init__(self, raw: BinaryIO, name: str, new: Callable[[], _Decompressor], error: type):
        self._raw = raw
        self._name = name
        self._new = new
        self._error = error
        self._stream = new()

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end."""
        while True:
            data = b""
            if self._stream.eof:
                # Zeros may follow a stream: xz pads with them, and so do tape blocks.
                data = self._stream.unused_data.lstrip(b"\0")
                while not data:
                    chunk = self._raw.read(_READ_CHUNK_BYTES)
                    if not chunk:
                        return b""
                    data = chunk.lstrip(b"\0")
                self._stream = self._new()
            elif self._stream.needs_input:
                data = self._raw.read(_READ_CHUNK_BYTES)
                if not data:
                    raise damaged(self._name, "it ends before its compressed stream does")
            try:
                expanded = self._stream.decompress(data, size)
            except (self._error, EOFError, MemoryError) as error:
                raise damaged(self._name, error) from error
            if expanded:
                return expanded


def _gzip(raw: io.BufferedReader, name: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw)


def _bzip2(raw: io.BufferedReader, name: str) -> _ConcatenatedStreams:
    return _ConcatenatedStreams(raw, name, bz2.BZ2Decompressor, OSError)


def _xz(raw: io.BufferedReader, name: str) -> _ConcatenatedStreams:
    return _ConcatenatedStreams(raw, name, lzma.LZMADecompressor, lzma.LZMAError)


def _zstd(raw: io.BufferedReader, name: str) -> _ConcatenatedStreams:
    zstd = needed(_ZSTD, name)
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_LONGEST_WINDOW_LOG}

    def new() -> _Decompressor:
        return zstd.ZstdDecompressor(options=options)

    return _ConcatenatedStreams(raw, name, new, zstd.ZstdError)


_DECOMPRESSORS: dict[str, Callable[[io.BufferedReader, str], BinaryIO | _ConcatenatedStreams]] = {
    ".bz2": _bzip2,
    ".gz": _gzip,
    ".lzma": _xz,
    ".xz": _xz,
    ".zst": _zstd,
    ".zstd": _zstd,
}
