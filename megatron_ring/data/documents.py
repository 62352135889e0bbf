"""Read the documents of a file: each line of JSON lines, each row of a parquet file, or a text.

Archives may hold JSON lines and texts. Text is UTF-8 and is kept exactly as it is, line endings
included. A document that cannot be read is yielded as a DataError with its file and line, and input
that is left out as a LeftOut; the caller decides whether to stop there.
"""

import codecs
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ring.data.archives import Member, tar_members, zip_members
from megatron_ring.data.compression import (
    ExpansionLimit,
    damaged,
    decompressed,
    expansion_limit,
    needed,
    opened,
    readable,
)
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
from megatron_ring.errors import DataError

MAX_DOCUMENT_BYTES = 128 << 20
"""The default of ``--max-document-bytes``."""

EMPTY = LeftOut("empty documents")
NOT_JSON_LINES = LeftOut("*.json that are not JSON lines")

_BYTE_ORDER_MARK = codecs.BOM_UTF8
_READ_CHUNK_BYTES = 1 << 20
_SNIFFED_BYTES = 1024
_SHOWN_CHARACTERS = 1000
_MOST_ROWS_PER_BATCH = 256
_BATCH_BYTES = 1 << 30
_PARQUET_BUFFER_BYTES = 1 << 20
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
            yield from _documents_of_part(self, reading)
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
        yield from _parquet_rows(file, reading, limit)
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
        for number, line in enumerate(_lines(content, reading.max_document_bytes), start=1):
            try:
                yield from _record(line, reading)
            except ValueError as error:
                yield DataError(f"{name}:{number}: {error}")
    else:
        yield _whole_text(content, name, reading.max_document_bytes)


def _whole_text(content: io.BufferedReader, name: str, limit: int) -> str | DataError:
    text = _read_up_to(limit + 1, content)
    if len(text) > limit:
        return DataError(f"{name}: {_too_long('a text', limit)}")
    if text == _BYTE_ORDER_MARK:
        return ""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        return DataError(f"{name}:{line}: {_not_utf8(error)}")


def _read_up_to(size: int, content: io.BufferedReader) -> bytes:
    """Read ``size`` bytes, or as many as there are.

    Reads in chunks, because one large read would allocate the memory for ``size`` first.
    """
    chunks = []
    while size and (chunk := content.read(min(size, _READ_CHUNK_BYTES))):
        chunks.append(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _documents_of_part(piece: Piece, reading: Reading) -> Iterator[str | DataError]:
    lines_before = None
    with readable(str(piece.file)), piece.file.open("rb") as file:
        if piece.start:
            # Begin one byte early: if that byte ends a line, the first line of the piece follows.
            file.seek(piece.start - 1)
            _skip_line(file, piece.stop)
        lines = _lines(file, reading.max_document_bytes, piece.stop)
        for number, line in enumerate(lines, start=1):
            try:
                yield from _record(line, reading)
            except ValueError as error:
                if lines_before is None:
                    lines_before = _count_lines_before(piece)
                yield DataError(f"{piece.file}:{lines_before + number}: {error}")


def _lines(file: io.BufferedReader, limit: int, stop: int | None = None) -> Iterator[bytes | None]:
    """Yield the lines that begin before ``stop``, None for a line of more than ``limit`` bytes."""
    while (stop is None or file.tell() < stop) and (line := file.readline(limit + 1)):
        if len(line) > limit and not line.endswith(b"\n"):
            del line
            _skip_line(file, stop)
            yield None
        else:
            yield line


def _skip_line(file: io.BufferedReader, stop: int | None) -> None:
    """Skip the rest of a line, at most up to ``stop``."""
    while stop is None or file.tell() < stop:
        chunk = file.readline(_READ_CHUNK_BYTES)
        if not chunk or chunk.endswith(b"\n"):
            return


def _count_lines_before(piece: Piece) -> int:
    """Count the lines that begin before the piece, by reading the file up to it."""
    if not piece.start:
        return 0
    newlines = 0
    left = piece.start - 1
    with piece.file.open("rb") as file:
        while left and (chunk := file.read(min(left, _READ_CHUNK_BYTES))):
            newlines += chunk.count(b"\n")
            left -= len(chunk)
    return newlines + 1


def _record(line: bytes | None, reading: Reading) -> Iterator[str]:
    """Yield the text of one line, nothing for a blank line or one with only a byte order mark.

    Raises ValueError with the fault and the remedy.
    """
    if line is None:
        raise ValueError(_too_long("a line", reading.max_document_bytes))
    line = line.removeprefix(_BYTE_ORDER_MARK)
    if line.strip():
        yield _json_text(line, reading.json_key)


def _json_text(line: bytes, json_key: str) -> str:
    try:
        # json.loads(bytes) would try UTF-16, and fail on half a character at the end of the line.
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    if "\0" in decoded:
        raise ValueError("byte 0x00, as in UTF-16: not a line of JSON in UTF-8. Convert the file.")
    try:
        record = json.loads(decoded)
    except ValueError as error:
        raise ValueError(
            f"not a line of JSON: {error}. Every line of JSON lines (.jsonl) is one object."
        ) from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply to be read. Remove the line.") from error
    if isinstance(record, dict) and json_key in record and record[json_key] is None:
        raise ValueError(_null(json_key))
    if not isinstance(record, dict) or json_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"no text under {json_key!r}; found {keys[:_SHOWN_CHARACTERS]}. Set --json-key."
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(
            f"the value under {json_key!r} is {type(text).__name__}, not text. Set --json-key."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"an unpaired surrogate at character {error.start}, which is not valid text."
        ) from error
    return text


def _null(json_key: str) -> str:
    return (
        f"the text under {json_key!r} is null. Remove the record, or skip such records with "
        "--on-error skip."
    )


def _too_long(unit: str, limit: int) -> str:
    return (
        f"{unit} of more than {limit:,} bytes, the longest document that is read. Raise "
        "--max-document-bytes (a process takes 30 to 150 bytes of memory for each), split the "
        "document, or skip it with --on-error skip."
    )


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return (
            f"byte {byte:#04x} begins the byte order mark of UTF-16, not UTF-8. Convert the file "
            "to UTF-8."
        )
    return f"byte {byte:#04x} is not UTF-8. Convert the file, or leave it out of --input."


def _parquet_rows(file: Path, reading: Reading, limit: ExpansionLimit) -> Iterator[str | DataError]:
    """Yield the text of each row, or an error with the row's number. Needs pyarrow."""
    key = reading.json_key
    parquet = needed("pyarrow.parquet", str(file))
    arrow = needed("pyarrow", str(file))
    # Buffered reading keeps one page in memory instead of one row group.
    options = {"pre_buffer": False, "buffer_size": _PARQUET_BUFFER_BYTES}
    try:
        with readable(str(file)), parquet.ParquetFile(file, **options) as table:
            _refuse_missing_column(file, table.schema_arrow, key)
            for number, row in enumerate(_cells(table, key), start=1):
                try:
                    yield _cell_text(row, arrow, reading, limit)
                except ValueError as error:
                    yield DataError(f"{file}:{number}: {error}")
    except arrow.ArrowException as error:
        raise damaged(str(file), f"{error} (or it is not a parquet file)") from error


def _cells(table: object, key: str) -> Iterator[object]:
    """Yield every value of a column, in batches of few rows.

    A dictionary-encoded column may repeat one long value in all rows, so that decoding many rows at
    once could take far more memory than the file has bytes.
    """
    column = table.schema_arrow.names.index(key)
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).column(column).total_uncompressed_size
        rows = min(max(_BATCH_BYTES // max(size, 1), 1), _MOST_ROWS_PER_BATCH)
        for batch in table.iter_batches(rows, row_groups=[group], columns=[key]):
            yield from batch.column(0)


def _cell_text(row: object, arrow: object, reading: Reading, limit: ExpansionLimit) -> str:
    if isinstance(row, arrow.DictionaryScalar):
        row = row.value
    if row is None or not row.is_valid:
        raise ValueError(_null(reading.json_key))
    if not (arrow.types.is_string(row.type) or arrow.types.is_large_string(row.type)):
        raise ValueError(f"no text under {reading.json_key!r}; found {row.type}. Set --json-key.")
    limit.count(row.as_buffer().size)
    if row.as_buffer().size > reading.max_document_bytes:
        raise ValueError(_too_long("a cell", reading.max_document_bytes))
    try:
        return row.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error


def _refuse_missing_column(file: Path, schema: object, json_key: str) -> None:
    if json_key not in schema.names:
        columns = ", ".join(map(repr, schema.names))
        raise DataError(
            f"{file} has no column {json_key!r}; found {columns[:_SHOWN_CHARACTERS]}. Set "
            "--json-key."
        )
