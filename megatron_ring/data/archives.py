"""Iterate over the files in a tar or zip archive, one after another, without writing to disk.

A member's name is shown in messages, and its suffix gives the format of the content; it is never
used as a path. Directories are ignored; links, devices and sparse files are left out and counted.
"""

import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.data.compression import ExpansionLimit, LimitedReader, damaged
from megatron_ring.data.file_formats import HEAD_BYTES, LeftOut
from megatron_ring.errors import DataError

NOT_FILES = LeftOut("links, devices and sparse files in archives")

_BLOCK = 512
_SKIP_CHUNK_BYTES = 1 << 20
# Long names and times of one member; real headers have a few hundred bytes.
_LONGEST_EXTENDED_HEADER = 1 << 20
# A member has at most a global header, a pax header, a long name and a long link.
_MOST_EXTENDED_HEADERS = 8
_SPARSE = "GNU.sparse"
# Offsets of the flag for a further block of sparse extents, in the first and in later blocks.
_GNU_SPARSE_EXTENDED = 482
_GNU_SPARSE_EXTENDED_AGAIN = 504
_SHOWN_CHARACTERS = 200
_NOT_FILE_TYPES = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


@dataclass(frozen=True)
class Member:
    """A file in an archive. ``content`` must be read before the next member is requested."""

    name: str
    content: io.BufferedReader

    @property
    def shown(self) -> str:
        """The name for a message, with line breaks and other control characters escaped."""
        return repr(self.name)[1:-1][:_SHOWN_CHARACTERS]


def tar_members(content: io.BufferedReader, name: str) -> Iterator[Member | LeftOut]:
    """Yield the members of the tar archive ``content``, which is read once from start to end.

    Archives that were concatenated with ``cat`` are read to the last. Raises DataError for an
    archive that is damaged or truncated.
    """
    ended = False
    extended: dict[str, bytes] = {}
    headers = 0
    while block := content.read(_BLOCK):
        if not any(block):
            ended = True
            headers = 0
            continue
        ended = False
        info = _parse_header(block, name)
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(_extended_header(content, info.size, name), name)
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _extended_header(content, info.size, name).split(b"\0")[0]
        elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _extended_header(content, info.size, name)
        else:
            yield from _tar_member(content, block, info, extended, name)
            extended = {}
            headers = 0
            continue
        headers += 1
        if headers > _MOST_EXTENDED_HEADERS:
            raise damaged(name, f"a member has more than {_MOST_EXTENDED_HEADERS} extended headers")
    if not ended:
        raise damaged(name, "it ends without the two blocks of zeros that end a tar archive")


def zip_members(file: Path, limit: ExpansionLimit) -> Iterator[Member | LeftOut]:
    """Yield the members of the zip archive ``file``, in its own order.

    ``limit`` counts what they expand to. Raises DataError for an archive that is damaged,
    encrypted, or compressed with an unknown method.
    """
    with _zip_errors(file):
        archive = zipfile.ZipFile(file)
    with archive:
        for info in archive.infolist():
            with _zip_errors(file):
                is_folder = info.is_dir()
            if is_folder:
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                yield NOT_FILES
                continue
            with _zip_errors(file):
                source = archive.open(info)
            with source:
                content = io.BufferedReader(LimitedReader(source, limit), HEAD_BYTES)
                yield Member(info.filename, content)


@contextmanager
def _zip_errors(file: Path) -> Iterator[None]:
    """Turn errors of the zip library into DataError.

    Most damage raises a built-in exception rather than one of the library's own.
    """
    try:
        yield
    except RuntimeError as error:  # encrypted, or an unknown compression method
        raise DataError(
            f"{file} cannot be read: {error}. Unpack it, or leave it out of --input."
        ) from error
    except (zipfile.BadZipFile, ValueError, IndexError, OverflowError, struct.error) as error:
        raise damaged(str(file), error) from error


def _tar_member(
    content: io.BufferedReader,
    block: bytes,
    info: tarfile.TarInfo,
    extended: dict[str, bytes],
    name: str,
) -> Iterator[Member | LeftOut]:
    size = _member_size(info, extended, name)
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE or _SPARSE in extended
    if info.type == tarfile.GNUTYPE_SPARSE:
        more = block[_GNU_SPARSE_EXTENDED]
        while more:
            more = _read_exactly(content, _BLOCK, name)[_GNU_SPARSE_EXTENDED_AGAIN]
    if info.type == tarfile.DIRTYPE:
        return
    if info.type in _NOT_FILE_TYPES:
        yield NOT_FILES
        return
    # POSIX: a member of unknown type is treated as a regular file.
    window = _Window(content, size, name)
    if is_sparse:
        yield NOT_FILES
    else:
        path = extended.get("path", info.name.encode(errors="surrogateescape"))
        yield Member(path.decode(errors="replace"), io.BufferedReader(window, HEAD_BYTES))
    window.skip_rest()
    _skip(content, -size % _BLOCK, name)


def _parse_header(block: bytes, name: str) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise damaged(name, f"a member's header cannot be read ({error})") from error


def _member_size(info: tarfile.TarInfo, extended: dict[str, bytes], name: str) -> int:
    try:
        size = int(extended["size"]) if "size" in extended else info.size
    except ValueError:
        size = -1
    if size < 0:
        raise damaged(name, "a member's size cannot be read")
    return size


def _pax_records(records: bytes, name: str) -> dict[str, bytes]:
    """Return ``path`` and ``size`` of a pax header, and ``GNU.sparse`` if any key begins with it.

    Records are lines ``LENGTH KEY=VALUE``, where LENGTH counts the whole record and its newline.
    """
    used: dict[str, bytes] = {}
    start = 0
    end = len(records.rstrip(b"\0"))
    while start < end:
        digits = records[start : start + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 1 < length <= len(records) - start:
            raise damaged(name, "a member's extended header cannot be read")
        key, _, value = records[start + len(digits) + 1 : start + length - 1].partition(b"=")
        if key in (b"path", b"size"):
            used[key.decode()] = value
        elif key.startswith(_SPARSE.encode()):
            used[_SPARSE] = b""
        start += length
    return used


def _extended_header(content: io.BufferedReader, size: int, name: str) -> bytes:
    """Read the content of an extended header and skip its padding."""
    if not 0 <= size <= _LONGEST_EXTENDED_HEADER:
        raise damaged(
            name,
            f"an extended header of {size} bytes, and the limit is {_LONGEST_EXTENDED_HEADER}",
        )
    header = _read_exactly(content, size, name)
    _skip(content, -size % _BLOCK, name)
    return header


def _read_exactly(content: io.BufferedReader, size: int, name: str) -> bytes:
    data = content.read(size)
    if len(data) < size:
        raise damaged(name, "it ends within a member")
    return data


def _skip(content: io.BufferedReader, size: int, name: str) -> None:
    while size:
        size -= len(_read_exactly(content, min(size, _SKIP_CHUNK_BYTES), name))


class _Window(io.RawIOBase):
    """Reads the next ``size`` bytes of ``content`` and no more."""

    def __init__(self, content: io.BufferedReader, size: int, name: str):
        self._content = content
        self._left = size
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        data = _read_exactly(self._content, min(len(into), self._left), self._name)
        into[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def skip_rest(self) -> None:
        """Skip the bytes that were not read."""
        _skip(self._content, self._left, self._name)
        self._left = 0
