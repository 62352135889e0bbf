"""Read JSON lines: one record a line, of which one key holds the text.

A file is read whole, or from any offset up to another: a line belongs to the part with its first
byte.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ring.data.compression import readable
from megatron_ring.data.document_text import (
    BYTE_ORDER_MARK,
    READ_CHUNK_BYTES,
    SHOWN_CHARACTERS,
    not_utf8,
    null_text,
    too_long,
)
from megatron_ring.errors import DataError


def texts_of_lines(
    content: io.BufferedReader, name: str, json_key: str, max_bytes: int
) -> Iterator[str | DataError]:
    """Yield the text of each line, or the error with its line number.

    Args:
        content: Uncompressed JSON lines; ``name`` is what messages call them.
        json_key: The key of a record's text.
        max_bytes: The longest line that is read.
    """
    for number, line in enumerate(_lines(content, max_bytes), start=1):
        try:
            yield from _record(line, json_key, max_bytes)
        except ValueError as error:
            yield DataError(f"{name}:{number}: {error}")


def texts_of_part(
    path: Path, start: int, stop: int, json_key: str, max_bytes: int
) -> Iterator[str | DataError]:
    """Yield the text of each line whose first byte is one of ``start`` to ``stop`` of the file.

    An error has the line's number in the whole file.
    """
    lines_before = None
    with readable(str(path)), path.open("rb") as file:
        if start:
            # Begin one byte early: if that byte ends a line, the first line of the part follows.
            file.seek(start - 1)
            _skip_line(file, stop)
        for number, line in enumerate(_lines(file, max_bytes, stop), start=1):
            try:
                yield from _record(line, json_key, max_bytes)
            except ValueError as error:
                if lines_before is None:
                    lines_before = _count_lines_before(path, start)
                yield DataError(f"{path}:{lines_before + number}: {error}")


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
        chunk = file.readline(READ_CHUNK_BYTES)
        if not chunk or chunk.endswith(b"\n"):
            return


def _count_lines_before(path: Path, start: int) -> int:
    """Count the lines that begin before ``start``, by reading the file up to it."""
    if not start:
        return 0
    newlines = 0
    left = start - 1
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, READ_CHUNK_BYTES))):
            newlines += chunk.count(b"\n")
            left -= len(chunk)
    return newlines + 1


def _record(line: bytes | None, json_key: str, max_bytes: int) -> Iterator[str]:
    """Yield the text of one line, nothing for a blank line or one with only a byte order mark.

    Raises ValueError with the fault and the remedy.
    """
    if line is None:
        raise ValueError(too_long("a line", max_bytes))
    line = line.removeprefix(BYTE_ORDER_MARK)
    if line.strip():
        yield _json_text(line, json_key)


def _json_text(line: bytes, json_key: str) -> str:
    try:
        # json.loads(bytes) would try UTF-16, and fail on half a character at the end of the line.
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error
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
        raise ValueError(null_text(json_key))
    if not isinstance(record, dict) or json_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"no text under {json_key!r}; found {keys[:SHOWN_CHARACTERS]}. Set --json-key."
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
