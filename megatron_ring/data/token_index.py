"""``P.idx``: where each document begins among the tokens of ``P.bin``, in Megatron's format.

All numbers are little-endian. There is one more document bound than there are documents::

    magic         9 bytes               MMIDIDX and two zeros
    version       u64                   1
    token type    u8                    a code, see ``_TYPES``
    counts        u64, u64              the number of sequences and of document bounds
    lengths       i32 per sequence      its tokens
    pointers      i64 per sequence      where it begins in P.bin, in bytes
    documents     i64 per bound         the sequence a document begins with, from 0 to the last + 1

Megatron may store a document as several sequences (one per sentence); they are joined to documents
here. For data of images and text it appends one byte per sequence, which is ignored.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_ring.errors import DataError

LONGEST_SEQUENCE = np.iinfo(np.int32).max

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Megatron's codes for integer types. Codes 6 and 7, float64 and float32, cannot be token ids.
_TYPES = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}


def idx_path(prefix: str | Path) -> Path:
    """Return the path of ``P.idx``."""
    return Path(f"{prefix}.idx")


def index_bytes(document_lengths: Sequence[int], dtype: np.dtype) -> bytes:
    """Return the content of ``P.idx`` for documents of these lengths in tokens of ``dtype``.

    Each document is one sequence.
    """
    count = len(document_lengths)
    lengths = np.array(document_lengths, dtype="<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    documents = np.arange(count + 1, dtype="<i8")
    header = _HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], count, count + 1)
    return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()


def read_index(prefix: str | Path) -> tuple[np.dtype, np.ndarray]:
    """Return the token type and where documents begin, in tokens.

    The starts are (documents + 1,) int64, from 0 to the number of tokens in the store. Raises
    DataError for an index that is damaged or of another format.
    """
    path = idx_path(prefix)
    index = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    dtype, sequences, bounds = _read_header(prefix, index)
    arrays = (("<i4", sequences), ("<i8", sequences), ("<i8", bounds))
    # Python integers do not overflow: a count in a damaged file can be anything up to 2**64.
    sizes = (np.dtype(kind).itemsize * count for kind, count in arrays)
    offsets = list(accumulate(sizes, initial=_HEADER.size))
    # Megatron's one byte per sequence may follow, but nothing else.
    if index.size not in (offsets[-1], offsets[-1] + sequences):
        raise damaged(
            prefix,
            path,
            f"{index.size} bytes, and {sequences} sequences with {bounds} document bounds take "
            f"{offsets[-1]}",
        )
    lengths, pointers, documents = (
        np.frombuffer(index, kind, count, offset) for (kind, count), offset in zip(arrays, offsets)
    )
    try:
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        _refuse_disorder(prefix, lengths, pointers, starts * dtype.itemsize, documents)
        return dtype, starts[documents]
    except MemoryError as error:
        raise damaged(
            prefix, path, f"{sequences} sequences, whose offsets do not fit into memory"
        ) from error


def read_counts(prefix: str | Path) -> tuple[np.dtype, int]:
    """Return the token type and the number of documents, from the header of the index alone.

    Raises DataError for a header that is damaged or of another format.
    """
    with idx_path(prefix).open("rb") as file:
        header = np.frombuffer(file.read(_HEADER.size), np.uint8)
    dtype, _, bounds = _read_header(prefix, header)
    return dtype, bounds - 1


def damaged(prefix: str | Path, path: Path, fault: str) -> DataError:
    """Return the error for a store with a damaged file. ``fault`` completes "PATH has ..."."""
    return DataError(
        f"token store {prefix}: {path} has {fault}. Set --data-path, or write it again with "
        f"{prepare_command(prefix)}."
    )


def prepare_command(prefix: str | Path, flags: str = "") -> str:
    """Return the command that writes a store, for error messages.

    ``prefix`` may be the path of one of its files, which is how P is often mistaken.
    """
    stem = Path(prefix)
    stem = stem.with_suffix("") if stem.suffix in (".bin", ".idx") else stem
    command = f"python tools/prepare_data.py --input FILES --output-prefix {stem}"
    return f"{command} {flags}".rstrip()


def _read_header(prefix: str | Path, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """Return the token type and the numbers of sequences and of document bounds."""
    path = idx_path(prefix)
    if index.size < _HEADER.size:
        raise damaged(
            prefix, path, f"{index.size} bytes, and its header alone takes {_HEADER.size}"
        )
    magic, version, code, sequences, bounds = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise damaged(
            prefix,
            path,
            f"{magic!r} as its first {len(_MAGIC)} bytes, and Megatron writes {_MAGIC!r}",
        )
    if version != _VERSION:
        raise damaged(prefix, path, f"format version {version}, and only {_VERSION} is supported")
    if code not in _TYPES:
        supported = ", ".join(f"{code} {dtype.name}" for code, dtype in _TYPES.items())
        raise damaged(prefix, path, f"token type {code}, and token ids are one of: {supported}")
    return _TYPES[code], sequences, bounds


def _refuse_disorder(
    prefix: str | Path,
    lengths: np.ndarray,
    pointers: np.ndarray,
    expected_pointers: np.ndarray,
    documents: np.ndarray,
) -> None:
    """Refuse sequences that do not follow one another, as Megatron writes them.

    A document is read as one range of tokens, so its sequences must be contiguous.
    """
    path = idx_path(prefix)
    if np.any(lengths < 0) or np.any(pointers != expected_pointers[:-1]):
        raise damaged(prefix, path, "sequences that are not contiguous")
    # Bounds are compared, not subtracted: the difference of two damaged bounds may wrap around.
    if (
        list(documents[:1]) != [0]
        or documents[-1] != len(lengths)
        or np.any(documents[1:] < documents[:-1])
    ):
        raise damaged(
            prefix,
            path,
            f"document bounds that do not increase from 0 to its {len(lengths)} sequences",
        )
