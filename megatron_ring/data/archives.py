"""The files in a tar or zip archive, one after another, without writing anything to disk.

A member's name is shown in messages and its suffix says what it holds; it is never used as a path.
Directories have no content; links, devices and sparse files are left out and counted.
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

from megatron_ring.data.compression import ExpansionLimit, Limited, damaged
from megatron_ring.data.file_formats import HEAD_BYTES, LeftOut
from megatron_ring.errors import DataError

NOT_FILES = LeftOut("links, devices and sparse files in archives")

_BLOCK = 512
_SKIPPED_AT_ONCE = 1 << 20
# Long names and times of one member; real ones have a few hundred bytes.
_LONGEST_EXTENDED_HEADER = 1 << 20
# A member has a global header, a pax header, a long name and a long link at most.
_MOST_EXTENDED_HEADERS = 8
_SPARSE = "GNU.sparse"
_GNU_SPARSE_EXTENDED = 482
_GNU_SPARSE_EXTENDED_AGAIN = 504
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Member:
    """A file in an archive. ``content`` has to be read before the next member is asked for."""

    name: str
    content: io.BufferedReader

    @property
    def shown(self) -> str:
        """The name for a message, without line breaks and other characters of control."""
        return repr(self.name)[1:-1][:_SHOWN_CHARACTERS]


def tar_members(content: io.BufferedReader, name: str) -> Iterator[Member | LeftOut]:
    """The members of the tar archive ``content``, which is read once from its beginning to its end.

    Archives that were put together with ``cat`` are read to the last. Raises DataError for an
    archive that is damaged or cut.
    """
    ended, extended, headers = False, {}, 0
    while block := content.read(_BLOCK):
        if not any(block):
            ended, headers = True, 0
            continue
        ended = False
        info = _header(block, name)
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(_small(content, info.size, name), name)
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _small(content, info.size, name).split(b"\0")[0]
        elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _small(content, info.size, name)
        else:
            yield from _tar_member(content, block, info, extended, name)
            extended, headers = {}, 0
            continue
        headers += 1
        if headers > _MOST_EXTENDED_HEADERS:
            raise damaged(name, f"a member has more than {_MOST_EXTENDED_HEADERS} extended headers")
    if not ended:
        raise damaged(name, "it ends without the two blocks of zeros that end a tar archive")


def zip_members(file: Path, limit: ExpansionLimit) -> Iterator[Member | LeftOut]:
    """The members of the zip archive ``file``, in its own order. Raises DataError as above.

    What they expand to is counted by ``limit``.
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
                content = io.BufferedReader(Limited(source, limit), HEAD_BYTES)
                yield Member(info.filename, content)


@contextmanager
def _zip_errors(file: Path) -> Iterator[None]:
    """Errors of the zip library, which has no class of its own for most damage, as DataError."""
    try:
        yield
    except RuntimeError as error:  # encrypted, or a method that is not known
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
    size = _size(info, extended, name)
    sparse = info.type == tarfile.GNUTYPE_SPARSE or _SPARSE in extended
    if info.type == tarfile.GNUTYPE_SPARSE:
        again = block[_GNU_SPARSE_EXTENDED]
        while again:
            again = _exactly(content, _BLOCK, name)[_GNU_SPARSE_EXTENDED_AGAIN]
    # A type that is not known is a file, as POSIX has it.
    kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    if info.type in (*kinds, tarfile.DIRTYPE):
        if info.type != tarfile.DIRTYPE:
            yield NOT_FILES
        return
    window = _Window(content, size, name)
    if sparse:
        yield NOT_FILES
    else:
        path = extended.get("path", info.name.encode(errors="surrogateescape"))
        yield Member(path.decode(errors="replace"), io.BufferedReader(window, HEAD_BYTES))
    window.skip_rest()
    _skip(content, -size % _BLOCK, name)


def _header(block: bytes, name: str) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise damaged(name, f"a member's header cannot be read ({error})") from error
    return info


def _size(info: tarfile.TarInfo, extended: dict[str, bytes], name: str) -> int:
    try:
        size = int(extended["size"]) if "size" in extended else info.size
    except ValueError:
        size = -1
    if size < 0:
        raise damaged(name, "a member's size cannot be read")
    return size


def _pax_records(records: bytes, name: str) -> dict[str, bytes]:
    """The ``path`` and ``size`` of a pax header, and ``GNU.sparse`` when it has a key of that kind.

    Its records are ``LENGTH KEY=VALUE\\n``, where LENGTH counts all of the record.
    """
    found, start = {}, 0
    end = len(records.rstrip(b"\0"))
    while start < end:
        digits = records[start : start + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 1 < length <= len(records) - start:
            raise damaged(name, "a member's extended header cannot be read")
        key, _, value = records[start + len(digits) + 1 : start + length - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value
        elif key.startswith(_SPARSE.encode()):
            found[_SPARSE] = b""
        start += length
    return found


def _small(content: io.BufferedReader, size: int, name: str) -> bytes:
    """The content of an extended header, and its padding passed over."""
    if not 0 <= size <= _LONGEST_EXTENDED_HEADER:
        raise damaged(
            name, f"an extended header of {size} bytes, {_LONGEST_EXTENDED_HEADER} at most are read"
        )
    found = _exactly(content, size, name)
    _skip(content, -size % _BLOCK, name)
    return found


def _exactly(content: io.BufferedReader, size: int, name: str) -> bytes:
    found = content.read(size)
    if len(found) < size:
        raise damaged(name, "it ends within a member")
    return found


def _skip(content: io.BufferedReader, size: int, name: str) -> None:
    while size:
        size -= len(_exactly(content, min(size, _SKIPPED_AT_ONCE), name))


class _Window(io.RawIOBase):
    """The next ``size`` bytes of ``content``."""

    def __init__(self, content: io.BufferedReader, size: int, name: str):
        self._content, self._left, self._name = content, size, name

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:
        found = _exactly(self._content, min(len(into), self._left), self._name)
        into[: len(found)] = found
        self._left -= len(found)
        return len(found)

    def skip_rest(self) -> None:
        """Pass over what was not read."""
        _skip(self._content, self._left, self._name)
        self._left = 0
