"""What a file or an archive's member holds, by its name and its first bytes.

The name decides where it is clear: ``.jsonl`` is JSON lines, ``.md`` is text. ``.json`` and names
that say nothing are decided by the content, and formats that are no text are refused by name.
"""

import json
import os
from dataclasses import dataclass
from enum import Enum, auto

SUFFIXES = (
    ".json",
    ".jsonl",
    ".jsonlines",
    ".md",
    ".ndjson",
    ".parquet",
    ".py",
    ".rst",
    ".tar",
    ".txt",
    ".zip",
)
"""What is read of a folder and of an archive, without the suffix of a compression."""

HEAD_BYTES = 1 << 16
"""How much of the content is looked at."""

COMPRESSIONS = (".bz2", ".gz", ".lzma", ".xz", ".zst", ".zstd")
"""Suffixes of compressed files."""

_JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
_TEXT = (".md", ".py", ".rst", ".text")
_COMPRESSED_TAR = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_NUL_LOOKED_FOR = 8000
_LONGEST_SUFFIX = 12

_REFUSED_SUFFIXES = {
    ".7z": "a 7z archive",
    ".br": "compressed with brotli",
    ".docx": "a Word document",
    ".epub": "an EPUB book",
    ".jar": "a Java archive",
    ".lz": "compressed with lzip",
    ".lz4": "compressed with lz4",
    ".npz": "NumPy arrays",
    ".odt": "an OpenDocument text",
    ".pptx": "a PowerPoint document",
    ".pt": "a PyTorch file",
    ".pth": "a PyTorch file",
    ".rar": "a RAR archive",
    ".whl": "a Python package",
    ".xlsx": "an Excel document",
    ".z": "compressed with compress",
}
_REFUSED_MAGIC = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"LZIP": "compressed with lzip",
    b"\x1f\x9d": "compressed with compress",
    b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a document of Microsoft Office",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
    b"GGUF": "a GGUF model",
    b"WARC/": "a web archive (WARC)",
    b"\x7fELF": "a program",
    b"\x89PNG\r\n": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x00\x05\x16\x07": "metadata of macOS (AppleDouble)",
}
_MAGIC = {b"PK\x03\x04": "ZIP", b"PK\x05\x06": "ZIP", b"PAR1": "PARQUET"}
_TAR_MAGIC = slice(257, 262), b"ustar"


class Kind(Enum):
    """How documents are taken from content."""

    JSON_LINES = auto()
    TEXT = auto()
    PARQUET = auto()
    TAR = auto()
    ZIP = auto()


class UnreadableFormat(ValueError):
    """Content that holds no documents that can be read. The message completes "FILE is"."""


class NotJsonLines(UnreadableFormat):
    """A ``.json`` that is one value rather than a record a line."""


@dataclass(frozen=True)
class LeftOut:
    """Something in the place of documents that is not read; ``reason`` is what it is counted by."""

    reason: str


def split_name(name: str) -> tuple[str, str]:
    """The suffix of what ``name`` holds and that of its compression, in lower case; "" for none.

    >>> split_name("c4.00000.JSON.gz"), split_name("a.tgz"), split_name("a.txt")
    (('.json', '.gz'), ('.tar', '.gz'), ('.txt', ''))
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _COMPRESSED_TAR:
        return ".tar", _COMPRESSED_TAR[suffix]
    if suffix in COMPRESSIONS:
        return os.path.splitext(stem)[1], suffix
    return suffix, ""


def pattern(suffix: str) -> str:
    """What files of ``suffix`` that are left out are counted by. The number of patterns is
    bounded."""
    if not suffix:
        return "files without a suffix"
    plain = len(suffix) <= _LONGEST_SUFFIX and suffix[1:].isascii() and suffix[1:].isalnum()
    return f"*{suffix}" if plain else "files with other suffixes"


def kind_of(head: bytes, suffix: str, json_key: str) -> Kind:
    """What content is that begins with ``head`` (HEAD_BYTES of it, if there are so many).

    ``suffix`` is in lower case and without that of a compression. Raises UnreadableFormat.
    """
    _refuse_known(head, suffix)
    place, magic = _TAR_MAGIC
    if head[place] == magic or suffix == ".tar":
        return Kind.TAR
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    found = found or {".parquet": "PARQUET", ".zip": "ZIP"}.get(suffix, "")
    if found:
        return Kind[found]
    if suffix in _JSON_LINES:
        return Kind.JSON_LINES
    if b"\0" in head[:_NUL_LOOKED_FOR]:
        raise UnreadableFormat("no text in UTF-8: it has NUL bytes, as binary data and UTF-16 do")
    if suffix in _TEXT:
        return Kind.TEXT
    record, complete = _first_record(head)
    if suffix == ".json":
        if record is None:
            raise NotJsonLines(
                "one JSON value over several lines, or an array, and every line has to be one object. "
                "Write it as JSON lines (jq -c '.[]' for an array, jq -c . for objects)"
            )
        return Kind.JSON_LINES
    # A text may begin with a brace: only a record that has the key is one.
    has_key = record is not None and (json_key in record if complete else _quoted(json_key) in head)
    return Kind.JSON_LINES if has_key else Kind.TEXT


def _refuse_known(head: bytes, suffix: str) -> None:
    if suffix in _REFUSED_SUFFIXES:
        raise UnreadableFormat(_REFUSED_SUFFIXES[suffix])
    if head.startswith(tuple(_REFUSED_MAGIC)):
        raise UnreadableFormat(
            next(name for magic, name in _REFUSED_MAGIC.items() if head.startswith(magic))
        )


def _first_record(head: bytes) -> tuple[dict | None, bool]:
    """The object in the first line that is not blank, and whether all of the line was seen.

    None where that line is something else. Of a longer line only its first character is known.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line, newline, _ = text.partition(b"\n")
    if not text:
        return {}, True
    if not newline and len(head) >= HEAD_BYTES:
        return ({} if line.startswith(b"{") else None), False
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, True
    return (record if isinstance(record, dict) else None), True


def _quoted(key: str) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode()
