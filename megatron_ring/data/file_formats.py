"""Recognize the format of a file or an archive member by its name and first bytes.

A known suffix decides: ``.jsonl`` is JSON lines, ``.md`` is text. ``.json`` and other names are
decided by the content. Formats that hold no text are refused, and the error names the format.
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
"""Suffixes, before that of a compression, of the files read from a folder or an archive."""

HEAD_BYTES = 1 << 16
"""How much of the content is used to recognize the format."""

COMPRESSIONS = (".bz2", ".gz", ".lzma", ".xz", ".zst", ".zstd")
"""Suffixes of compressed files."""

_JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")
_TEXT = (".md", ".py", ".rst", ".text")
_COMPRESSED_TAR = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_NUL_SEARCHED_BYTES = 8000
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
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a Microsoft Office document",
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
    b"\x00\x05\x16\x07": "macOS metadata (AppleDouble)",
}
_TAR_MAGIC = b"ustar"
_TAR_MAGIC_BYTES = slice(257, 262)


class Kind(Enum):
    """The way documents are read from content."""

    JSON_LINES = auto()
    TEXT = auto()
    PARQUET = auto()
    TAR = auto()
    ZIP = auto()


_MAGIC = {b"PK\x03\x04": Kind.ZIP, b"PK\x05\x06": Kind.ZIP, b"PAR1": Kind.PARQUET}
_CONTAINERS = {".parquet": Kind.PARQUET, ".zip": Kind.ZIP}


class UnreadableFormat(ValueError):
    """Content without documents that can be read. The message completes "FILE is"."""


class NotJsonLines(UnreadableFormat):
    """A ``.json`` file that is one value rather than one record per line."""


@dataclass(frozen=True)
class LeftOut:
    """Input that is not read, found where documents are expected; counted by ``reason``."""

    reason: str


def split_name(name: str) -> tuple[str, str]:
    """Return the suffix of the content and that of the compression, in lower case; "" if absent.

    >>> split_name("c4.00000.JSON.gz"), split_name("a.tgz"), split_name("a.txt")
    (('.json', '.gz'), ('.tar', '.gz'), ('.txt', ''))
    """
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _COMPRESSED_TAR:
        return ".tar", _COMPRESSED_TAR[suffix]
    if suffix in COMPRESSIONS:
        return os.path.splitext(stem)[1], suffix
    return suffix, ""


def suffix_pattern(suffix: str) -> str:
    """Return the reason under which files of ``suffix`` are counted as left out.

    Long or unusual suffixes share one reason, which limits the number of reasons.
    """
    if not suffix:
        return "files without a suffix"
    is_usual = len(suffix) <= _LONGEST_SUFFIX and suffix[1:].isascii() and suffix[1:].isalnum()
    return f"*{suffix}" if is_usual else "files with other suffixes"


def kind_of(head: bytes, suffix: str, json_key: str) -> Kind:
    """Return the kind of the content that begins with ``head``.

    ``head`` has at least HEAD_BYTES bytes, or all of the content if that is shorter. ``suffix`` is
    the content's suffix, in lower case and without that of a compression. Raises UnreadableFormat.
    """
    _refuse_known(head, suffix)
    if head[_TAR_MAGIC_BYTES] == _TAR_MAGIC or suffix == ".tar":
        return Kind.TAR
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if suffix in _CONTAINERS:
        return _CONTAINERS[suffix]
    if suffix in _JSON_LINES:
        return Kind.JSON_LINES
    if b"\0" in head[:_NUL_SEARCHED_BYTES]:
        raise UnreadableFormat("not UTF-8 text: it has NUL bytes, as binary data and UTF-16 do")
    if suffix in _TEXT:
        return Kind.TEXT
    record, complete = _first_record(head)
    if suffix == ".json":
        if record is None:
            raise NotJsonLines(
                "one JSON value over several lines, or an array, and every line must be one "
                "object. Write it as JSON lines (jq -c '.[]' for an array, jq -c . for objects)"
            )
        return Kind.JSON_LINES
    # Text may begin with a brace too: only a record with the key counts as JSON lines.
    if record is None:
        return Kind.TEXT
    has_key = json_key in record if complete else _quoted(json_key) in head
    return Kind.JSON_LINES if has_key else Kind.TEXT


def _refuse_known(head: bytes, suffix: str) -> None:
    if suffix in _REFUSED_SUFFIXES:
        raise UnreadableFormat(_REFUSED_SUFFIXES[suffix])
    for magic, description in _REFUSED_MAGIC.items():
        if head.startswith(magic):
            raise UnreadableFormat(description)


def _first_record(head: bytes) -> tuple[dict | None, bool]:
    """Return the object in the first line that is not blank, and whether that line is complete.

    None where the line is not an object. A line that extends beyond ``head`` counts as an object,
    with no known keys, if it begins with a brace.
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
