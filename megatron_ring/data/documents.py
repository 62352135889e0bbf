"""The documents of a file: all of a text, each line of a ``.jsonl``, each row of a ``.parquet``.

Text is taken exactly as it stands, in UTF-8, line endings included. What cannot be read comes in its place as the
DataError that names its file and line; whoever reads decides whether to stop there.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ring.data.compression import bare_suffix, is_compressed, needed, opened
from megatron_ring.errors import DataError

_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of a file; a line belongs to the piece that its first byte is in."""

    file: Path
    start: int
    stop: int

    def documents(self, json_key: str) -> Iterator[str | DataError]:
        """Every document; raises DataError for a file of which nothing more can be read."""
        yield from _READERS.get(bare_suffix(self.file), _whole_text)(self, json_key)


def _whole_text(piece: Piece, json_key: str) -> Iterator[str | DataError]:
    with opened(piece.file) as file:
        content = file.read()
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield DataError(f"{piece.file}:{line}: {_not_utf8(error)}")


def _json_lines(piece: Piece, json_key: str) -> Iterator[str | DataError]:
    for number, line in enumerate(_lines(piece), start=1):
        if line.strip():
            try:
                yield _json_text(line, json_key)
            except ValueError as error:
                yield DataError(f"{piece.file}:{_lines_before(piece) + number}: {error}")


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines of the piece. A compressed file is always one piece, of all its lines."""
    with opened(piece.file) as file:
        if piece.start:
            # One byte early: where that is the end of a line, the next line is this piece's first.
            file.seek(piece.start - 1)
            file.readline()
        while is_compressed(piece.file) or file.tell() < piece.stop:
            if not (line := file.readline()):
                return
            yield line


def _lines_before(piece: Piece) -> int:
    """Lines that begin before the piece: counted only for a message, since it reads the file up to there."""
    if not piece.start:
        return 0
    with opened(piece.file) as file:
        newlines, left = 0, piece.start - 1
        while left and (some := file.read(min(left, _COUNTED_AT_ONCE))):
            newlines, left = newlines + some.count(b"\n"), left - len(some)
    return newlines + 1


def _json_text(line: bytes, json_key: str) -> str:
    """The text under ``json_key``, or ValueError saying what is wrong and how to mend it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    except ValueError as error:
        raise ValueError(f"not a line of JSON: {error}. Every line of a .jsonl file is one object.") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deep to be read. Leave the line out.") from error
    if not isinstance(record, dict) or not isinstance(text := record.get(json_key), str):
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no text under {json_key!r}; found {keys}. Set --json-key.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}, which is no text.") from error
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} is not UTF-8. Convert the file, or leave it out of --input."


def _parquet_rows(piece: Piece, json_key: str) -> Iterator[str | DataError]:
    """The column ``json_key``; a row without text is named by its number. Needs the package pyarrow."""
    parquet = needed("pyarrow.parquet", piece.file)
    arrow_error = needed("pyarrow", piece.file).ArrowException
    try:
        with opened(piece.file) as content, parquet.ParquetFile(content) as file:
            _refuse_missing_column(piece.file, file.schema_arrow, json_key)
            rows = (row for batch in file.iter_batches(columns=[json_key]) for row in batch.column(0).to_pylist())
            for number, text in enumerate(rows, start=1):
                found = f"{piece.file}:{number}: no text under {json_key!r}; found {type(text).__name__}."
                yield text if isinstance(text, str) else DataError(found)
    except (arrow_error, UnicodeDecodeError) as error:
        raise DataError(f"{piece.file} is damaged, or no parquet file: {error}. Leave it out of --input.") from error


def _refuse_missing_column(file: Path, schema: object, json_key: str) -> None:
    if json_key not in schema.names:
        columns = ", ".join(map(repr, schema.names))
        raise DataError(f"{file} has no column {json_key!r}; found {columns}. Set --json-key.")


_READERS: dict[str, Callable[[Piece, str], Iterator[str | DataError]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}
