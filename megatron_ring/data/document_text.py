"""The text of a document: UTF-8 of at most ``--max-document-bytes``; anything else is a fault.

Faults, with their remedies, are the same for whole texts (``whole_text``), lines (json_lines.py)
and rows (parquet_rows.py).
"""

import codecs
import io

from megatron_ring.errors import DataError

BYTE_ORDER_MARK = codecs.BOM_UTF8
READ_CHUNK_BYTES = 1 << 20
SHOWN_CHARACTERS = 1000
"""How much of a file's keys or column names a message shows."""


def whole_text(content: io.BufferedReader, name: str, limit: int) -> str | DataError:
    """Return all of ``content`` as one text, or the error if it has more than ``limit`` bytes.

    Content that is not UTF-8 is an error with its line. One with only a byte order mark is empty.
    """
    text = _read_up_to(limit + 1, content)
    if len(text) > limit:
        return DataError(f"{name}: {too_long('a text', limit)}")
    if text == BYTE_ORDER_MARK:
        return ""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        return DataError(f"{name}:{line}: {not_utf8(error)}")


def _read_up_to(size: int, content: io.BufferedReader) -> bytes:
    """Read ``size`` bytes, or as many as there are.

    Reads in chunks, because one large read would allocate the memory for ``size`` first.
    """
    chunks = []
    while size and (chunk := content.read(min(size, READ_CHUNK_BYTES))):
        chunks.append(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def null_text(json_key: str) -> str:
    """Return the fault of a record without text, and the remedy."""
    return (
        f"the text under {json_key!r} is null. Remove the record, or skip such records with "
        "--on-error skip."
    )


def too_long(unit: str, limit: int) -> str:
    """Return the fault of a document of more than ``limit`` bytes, and the remedies."""
    return (
        f"{unit} of more than {limit:,} bytes, the longest document that is read. Raise "
        "--max-document-bytes (a process takes 30 to 150 bytes of memory for each), split the "
        "document, or skip it with --on-error skip."
    )


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the fault of a document whose bytes are not UTF-8, and the remedy."""
    byte = error.object[error.start]
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return (
            f"byte {byte:#04x} begins the byte order mark of UTF-16, not UTF-8. Convert the file "
            "to UTF-8."
        )
    return f"byte {byte:#04x} is not UTF-8. Convert the file, or leave it out of --input."
