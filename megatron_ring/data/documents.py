"""Read the documents of a file in any format, and of the files in an archive.

A document is a line of JSON lines (json_lines.py), a row of a Parquet file (parquet_rows.py), or a
whole text (document_text.py). Archives may hold JSON lines and texts. Text is UTF-8 and is kept
exactly as it is, line endings included. A document that cannot be read is yielded as a DataError
with its file and line, and input that is left out as a LeftOut; the caller decides whether to stop
there.
"""

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ring.data.archives import Member, tar_members, zip_members
from megatron_ring.data.compression import (
    ExpansionLimit,
    decompressed,
    expansion_limit,
    opened,
    readable,
)
from megatron_ring.data.document_text import whole_text
from megatron_ring.data.file_formats import (
    SUFFIXES,
    Kind,
    LeftOut,
    NotJsonLines,
    UnreadableFormat,
    kind_of,
    split_name,
    suffix_pattern,
)
from megatron_ring.data.json_lines import texts_of_lines, texts_of_part
from megatron_ring.data.parquet_rows import texts_of_rows
from megatron_ring.errors import DataError

MAX_DOCUMENT_BYTES = 128 << 20
"""The default of ``--max-document-bytes``."""

EMPTY = LeftOut("empty documents")
NOT_JSON_LINES = LeftOut("*.json that are not JSON lines")

_SNIFFED_BYTES = 1024
_MOST_REASONS = 1000
_OTHER_REASONS = "others"

Found = str | DataError | LeftOut
"""What reading yields: the text of a document, a document that cannot be read, or other input."""


@dataclass(frozen=True)
class Reading:
    """The options of reading documents.

    ``json_key`` is the key of a record's text, ``on_error`` what to do about a document that cannot
    be read, ``max_document_bytes`` the longest line, text or cell, and ``suffixes`` select the
    members of an archive.
    """

    json_key: str = "text"
    on_error: Literal["stop", "skip"] = "stop"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    suffixes: tuple[str, ...] = SUFFIXES

    def texts(
        self,
        shard: Iterable["Piece"],
        skipped: list[str],
        left_out: Counter[str] | None = None,
    ) -> Iterator[str]:
        """Yield every document that is not empty; Megatron leaves out empty ones too.

        The DataError of a document that cannot be read is raised, or with on_error "skip" its
        message is appended to ``skipped``. Input that is left out is counted in ``left_out`` by
        reason.
        """
        counts = Counter() if left_out is None else left_out
        for found in itertools.chain.from_iterable(piece.documents(self) for piece in shard):
            if isinstance(found, DataError):
                if self.on_error == "stop":
                    raise found
                skipped.append(str(found))
            elif isinstance(found, LeftOut):
                count_left_out(counts, found)
            elif not found:
                count_left_out(counts, EMPTY)
            else:
                yield found


DEFAULT_READING = Reading()


def count_left_out(counts: Counter[str], left_out: LeftOut) -> None:
    """Add one to the count of its reason; beyond 1000 reasons further ones share one count."""
    has_own_count = left_out.reason in counts or len(counts) < _MOST_REASONS
    counts[left_out.reason if has_own_count else _OTHER_REASONS] += 1


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of a file; a line belongs to the piece with its first byte.

    ``part_of_lines`` marks a piece of uncompressed JSON lines. Any other piece is a whole file.
    """

    file: Path
    start: int
    stop: int
    part_of_lines: bool = False

    def documents(self, reading: Reading) -> Iterator[Found]:
        """Yield every document. Raises DataError where nothing more of the file can be read."""
        if self.part_of_lines:
            yield from texts_of_part(
                self.file, self.start, self.stop, reading.json_key, reading.max_document_bytes
            )
        else:
            limit = expansion_limit(self.file)
            with opened(self.file, limit) as content:
                yield from _documents_of_file(self.file, content, reading, limit)


def refuse_unreadable(file: Path, reading: Reading) -> None:
    """Raise DataError for a file in a format without documents that can be read."""
    with opened(file) as content:
        try:
            kind_of(content.peek(), split_name(file.name)[0], reading.json_key)
        except UnreadableFormat as error:
            raise _unreadable(str(file), error) from error


def is_plain_json_lines(file: Path, json_key: str) -> bool:
    """Return whether ``file`` is uncompressed JSON lines, which can be read from any offset."""
    suffix, compression = split_name(file.name)
    if compression:
        return False
    with readable(str(file)), file.open("rb") as raw, opened(file) as content:
        is_compressed = content.peek()[:_SNIFFED_BYTES] != raw.read(_SNIFFED_BYTES)
        if is_compressed:
            return False
        try:
            return kind_of(content.peek(), suffix, json_key) is Kind.JSON_LINES
        except UnreadableFormat:
            return False


def _documents_of_file(
    file: Path, content: io.BufferedReader, reading: Reading, limit: ExpansionLimit
) -> Iterator[Found]:
    suffix, compression = split_name(file.name)
    kind = _kind(content, str(file), suffix, reading)
    if not isinstance(kind, Kind):
        yield kind
    elif kind in (Kind.PARQUET, Kind.ZIP) and (compression or _is_compressed(file, content)):
        yield DataError(
            f"{file} is compressed twice: a {kind.name.lower()} file is compressed itself. "
            "Decompress it once, or leave it out of --input."
        )
    elif kind is Kind.PARQUET:
        yield from texts_of_rows(file, reading.json_key, reading.max_document_bytes, limit)
    elif kind is Kind.TAR:
        members = tar_members(content, str(file))
        yield from _documents_of_members(members, str(file), reading, limit)
    elif kind is Kind.ZIP:
        members = zip_members(file, limit)
        yield from _documents_of_members(members, str(file), reading, limit)
    else:
        yield from _documents_of_content(kind, content, str(file), reading)


def _is_compressed(file: Path, content: io.BufferedReader) -> bool:
    with file.open("rb") as raw:
        return raw.read(4) != content.peek()[:4]


def _documents_of_members(
    members: Iterator[Member | LeftOut], name: str, reading: Reading, limit: ExpansionLimit
) -> Iterator[Found]:
    for member in members:
        if isinstance(member, LeftOut):
            yield member
            continue
        suffix, compression = split_name(member.name)
        if suffix not in reading.suffixes:
            yield LeftOut(f"{suffix_pattern(suffix)} in archives")
            continue
        shown = f"{name}:{member.shown}"
        content = decompressed(member.content, shown, compression, limit)
        with readable(shown):
            kind = _kind(content, shown, suffix, reading)
            if not isinstance(kind, Kind):
                yield kind
            elif kind in (Kind.PARQUET, Kind.TAR, Kind.ZIP):
                yield LeftOut(f"*.{kind.name.lower()} in archives")
            else:
                yield from _documents_of_content(kind, content, shown, reading)


def _kind(
    content: io.BufferedReader, name: str, suffix: str, reading: Reading
) -> Kind | DataError | LeftOut:
    try:
        return kind_of(content.peek(), suffix, reading.json_key)
    except NotJsonLines:
        return NOT_JSON_LINES
    except UnreadableFormat as error:
        return _unreadable(name, error)


def _unreadable(name: str, error: UnreadableFormat) -> DataError:
    return DataError(f"{name} is {error}. Convert it, or leave it out of --input.")


def _documents_of_content(
    kind: Kind, content: io.BufferedReader, name: str, reading: Reading
) -> Iterator[str | DataError]:
    if kind is Kind.JSON_LINES:
        yield from texts_of_lines(content, name, reading.json_key, reading.max_document_bytes)
    else:
        yield whole_text(content, name, reading.max_document_bytes)
