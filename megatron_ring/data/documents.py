"""The documents of a file: each line of JSON lines, each row of a parquet file, or all of a text.

Archives hold files of the first and last kind. Text is taken exactly as it stands, in UTF-8, line
endings included. What cannot be read comes in its place as the DataError that names its file and
line, what is left out as LeftOut; the caller decides whether to stop there.
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
    pattern,
    split_name,
)
from megatron_ring.errors import DataError

MAX_DOCUMENT_BYTES = 128 << 20
"""The default of ``--max-document-bytes``."""

EMPTY = LeftOut("empty documents")
NOT_JSON_LINES = LeftOut("*.json that are not JSON lines")

_BYTE_ORDER_MARK = codecs.BOM_UTF8
_READ_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 256
_ROWS_BYTES = 1 << 30
_PARQUET_BUFFER = 1 << 20
_LARGEST_COUNTER = 1000
_OTHER = "others"

Found = str | DataError | LeftOut


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    ``json_key`` is where the text of a record is, ``on_error`` what to do about a document that
    cannot be read, ``max_document_bytes`` the longest line, text or cell, ``suffixes`` what is read
    of an archive.
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
        """Every document that is not empty, as Megatron does.

        A document that cannot be read is raised, or its message appended to ``skipped``; what is
        left out is counted in ``left_out`` by its reason.
        """
        counts = Counter() if left_out is None else left_out
        for found in itertools.chain.from_iterable(piece.documents(self) for piece in shard):
            if isinstance(found, DataError):
                if self.on_error == "stop":
                    raise found
                skipped.append(str(found))
            elif isinstance(found, LeftOut) or not found:
                count(counts, found or EMPTY)
            else:
                yield found


AS_USUAL = Reading()
"""The defaults."""


def count(counts: Counter[str], left_out: LeftOut) -> None:
    """Count one more by its reason; the number of reasons is bounded."""
    known = left_out.reason in counts or len(counts) < _LARGEST_COUNTER
    counts[left_out.reason if known else _OTHER] += 1


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of a file; a line belongs to the piece that its first byte is in.

    ``part_of_lines``: a piece of plain JSON lines. Any other piece is a whole file.
    """

    file: Path
    start: int
    stop: int
    part_of_lines: bool = False

    def documents(self, reading: Reading) -> Iterator[Found]:
        """Every document; raises DataError for a file of which nothing more can be read."""
        if self.part_of_lines:
            yield from _part_of_lines(self, reading)
        else:
            limit = expansion_limit(self.file)
            with opened(self.file, limit) as content:
                yield from _file_documents(self.file, content, reading, limit)


def refuse_unreadable(file: Path, reading: Reading) -> None:
    """Raises DataError for a file that was named and holds nothing that can be read."""
    with opened(file) as content:
        try:
            kind_of(content.peek(), split_name(file.name)[0], reading.json_key)
        except UnreadableFormat as error:
            raise _unreadable(str(file), error) from error


def is_plain_json_lines(file: Path, json_key: str) -> bool:
    """Whether lines can be found from anywhere in ``file``."""
    suffix, compression = split_name(file.name)
    if compression:
        return False
    with readable(str(file)), file.open("rb") as raw, opened(file) as content:
        if content.peek()[:1024] != raw.read(1024):
            return False
        try:
            return kind_of(content.peek(), suffix, json_key) is Kind.JSON_LINES
        except UnreadableFormat:
            return False


def _file_documents(
    file: Path, content: io.BufferedReader, reading: Reading, limit: ExpansionLimit
) -> Iterator[Found]:
    suffix, compression = split_name(file.name)
    kind = _kind(content, str(file), suffix, reading)
    if not isinstance(kind, Kind):
        yield kind
    elif kind in (Kind.PARQUET, Kind.ZIP) and (compression or _is_compressed(file, content)):
        yield DataError(
            f"{file} is compressed twice: a {kind.name.lower()} file compresses what it holds. "
            "Decompress it once, or leave it out of --input."
        )
    elif kind is Kind.PARQUET:
        yield from _parquet_rows(file, reading, limit)
    elif kind is Kind.TAR:
        yield from _members(tar_members(content, str(file)), str(file), reading, limit)
    elif kind is Kind.ZIP:
        yield from _members(zip_members(file, limit), str(file), reading, limit)
    else:
        yield from _content_documents(kind, content, str(file), reading)


def _is_compressed(file: Path, content: io.BufferedReader) -> bool:
    with file.open("rb") as raw:
        return raw.read(4) != content.peek()[:4]


def _members(
    members: Iterator[Member | LeftOut], name: str, reading: Reading, limit: ExpansionLimit
) -> Iterator[Found]:
    for member in members:
        if isinstance(member, LeftOut):
            yield member
            continue
        suffix, compression = split_name(member.name)
        if suffix not in reading.suffixes:
            yield LeftOut(f"{pattern(suffix)} in archives")
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
                yield from _content_documents(kind, content, shown, reading)


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


def _content_documents(
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
    text = _up_to(limit + 1, content)
    if len(text) > limit:
        return DataError(f"{name}: {_too_long('a text', limit)}")
    if text == _BYTE_ORDER_MARK:
        return ""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        return DataError(f"{name}:{line}: {_not_utf8(error)}")


def _up_to(size: int, content: io.BufferedReader) -> bytes:
    """So many bytes, or all there are. In steps: a single read would set aside the memory for
    ``size`` first."""
    chunks = []
    while size and (some := content.read(min(size, _READ_AT_ONCE))):
        chunks.append(some)
        size -= len(some)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _part_of_lines(piece: Piece, reading: Reading) -> Iterator[str | DataError]:
    before = None
    with readable(str(piece.file)), piece.file.open("rb") as file:
        if piece.start:
            # One byte early: where that ends a line, the next line is this piece's first.
            file.seek(piece.start - 1)
            _skip_line(file, piece.stop)
        lines = _lines(file, reading.max_document_bytes, piece.stop)
        for number, line in enumerate(lines, start=1):
            try:
                yield from _record(line, reading)
            except ValueError as error:
                before = _lines_before(piece) if before is None else before
                yield DataError(f"{piece.file}:{before + number}: {error}")


def _lines(file: io.BufferedReader, limit: int, stop: int | None = None) -> Iterator[bytes | None]:
    """The lines that begin before ``stop``; None for one of more than ``limit`` bytes."""
    while (stop is None or file.tell() < stop) and (line := file.readline(limit + 1)):
        if len(line) > limit and not line.endswith(b"\n"):
            del line
            _skip_line(file, stop)
            yield None
        else:
            yield line


def _skip_line(file: io.BufferedReader, stop: int | None) -> None:
    """Pass over the rest of a line, as far as ``stop``."""
    while stop is None or file.tell() < stop:
        some = file.readline(_READ_AT_ONCE)
        if not some or some.endswith(b"\n"):
            return


def _lines_before(piece: Piece) -> int:
    """Lines that begin before the piece, which takes reading the file up to there."""
    if not piece.start:
        return 0
    with piece.file.open("rb") as file:
        newlines, left = 0, piece.start - 1
        while left and (some := file.read(min(left, _READ_AT_ONCE))):
            newlines, left = newlines + some.count(b"\n"), left - len(some)
    return newlines + 1


def _record(line: bytes | None, reading: Reading) -> Iterator[str]:
    """The text of one line, none where it is blank or only a byte order mark. Raises ValueError: what is wrong, the
    remedy."""
    if line is None:
        raise ValueError(_too_long("a line", reading.max_document_bytes))
    line = line.removeprefix(_BYTE_ORDER_MARK)
    if line.strip():
        yield _json_text(line, reading.json_key)


def _json_text(line: bytes, json_key: str) -> str:
    try:
        # json.loads(bytes) would guess at UTF-16, and fail at the half of a character that a line ends with.
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    if "\0" in decoded:
        raise ValueError(
            "byte 0x00, as UTF-16 has them: not a line of JSON in UTF-8. Convert the file."
        )
    try:
        record = json.loads(decoded)
    except ValueError as error:
        raise ValueError(
            f"not a line of JSON: {error}. Every line of JSON lines (.jsonl) is one object."
        ) from error
    except RecursionError as error:
        raise ValueError("JSON nested too deep to be read. Leave the line out.") from error
    if isinstance(record, dict) and json_key in record and record[json_key] is None:
        raise ValueError(_null(json_key))
    if not isinstance(record, dict) or json_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no text under {json_key!r}; found {keys[:1000]}. Set --json-key.")
    text = record[json_key]
    if not isinstance(text, str):
        raise ValueError(
            f"the value under {json_key!r} is {type(text).__name__}, not text. Set --json-key."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"half a surrogate pair at character {error.start}, which is no text."
        ) from error
    return text


def _null(json_key: str) -> str:
    return f"the text under {json_key!r} is null. Leave the record out, or pass over such records with --on-error skip."


def _too_long(what: str, limit: int) -> str:
    return (
        f"{what} of more than {limit:,} bytes, the longest document that is read. Raise "
        "--max-document-bytes (a process takes 30 to 150 bytes of memory for each), cut the document, "
        "or pass over it with --on-error skip."
    )


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"byte {byte:#04x} begins the byte order mark of UTF-16, not UTF-8. Convert the file to UTF-8."
    return f"byte {byte:#04x} is not UTF-8. Convert the file, or leave it out of --input."


def _parquet_rows(file: Path, reading: Reading, limit: ExpansionLimit) -> Iterator[str | DataError]:
    """The column of the text; a row without text is named by its number. Needs pyarrow."""
    key = reading.json_key
    parquet = needed("pyarrow.parquet", str(file))
    arrow = needed("pyarrow", str(file))
    # Buffered, so that a page is in memory at a time and not a row group.
    options = {"pre_buffer": False, "buffer_size": _PARQUET_BUFFER}
    try:
        with readable(str(file)), parquet.ParquetFile(file, **options) as table:
            _refuse_missing_column(file, table.schema_arrow, key)
            for number, row in enumerate(_cells(table, key), start=1):
                try:
                    yield _cell_text(row, arrow, reading, limit)
                except ValueError as error:
                    yield DataError(f"{file}:{number}: {error}")
    except arrow.ArrowException as error:
        raise damaged(str(file), f"{error} (or it is no parquet file)") from error


def _cells(table: object, key: str) -> Iterator[object]:
    """Every value of a column. Few rows at a time: a long value may be one of a dictionary that all
    rows repeat."""
    column = table.schema_arrow.names.index(key)
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).column(column).total_uncompressed_size
        rows = min(max(_ROWS_BYTES // max(size, 1), 1), _ROWS_AT_ONCE)
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
            f"{file} has no column {json_key!r}; found {columns[:1000]}. Set --json-key."
        )
