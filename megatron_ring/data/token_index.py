"""``P.idx``: where each document begins in the tokens of ``P.bin``, in Megatron's format, little-endian.

    magic         9 bytes       MMIDIDX and two zeros
    version       u64           1
    token type    u8            a code, see ``_TYPES``
    counts        u64, u64      N sequences, M + 1 document bounds
    lengths       N x i32       tokens of each sequence
    pointers      N x i64       where each sequence begins in P.bin, in bytes
    documents     (M+1) x i64   the sequence each document begins with, from 0 to N

Megatron may keep a document as several sequences (one a sentence), and after these parts a byte for each sequence of
images and text; the first are read, joined to documents again by tokens.py, the last is passed over.
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
# Megatron's codes. It also has 6 and 7, float64 and float32, which are no token ids.
_TYPES = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}


def idx_path(prefix: str | Path) -> Path:
    """``P.idx``."""
    return Path(f"{prefix}.idx")


def index_bytes(document_lengths: Sequence[int], dtype: np.dtype) -> bytes:
    """The content of ``P.idx`` for documents of these lengths, one sequence each, in tokens of ``dtype``."""
    count = len(document_lengths)
    lengths = np.array(document_lengths, dtype="<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    documents = np.arange(count + 1, dtype="<i8")
    header = _HEADER.pack(_MAGIC, _VERSION, _CODES[dtype], count, count + 1)
    return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()


def read_index(prefix: str | Path) -> tuple[np.dtype, np.ndarray]:
    """The token type, and where documents begin in tokens: (M+1,) int64 from 0 to the store's tokens.

    Raises DataError for an index that is damaged or of another format.
    """
    path = idx_path(prefix)
    index = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    dtype, sequences, bounds = _header(prefix, index)
    parts = (("<i4", sequences), ("<i8", sequences), ("<i8", bounds))
    # In Python's integers, for a damaged count can be anything up to 2**64.
    offsets = list(
        accumulate((np.dtype(kind).itemsize * count for kind, count in parts), initial=_HEADER.size)
    )
    # Megatron's byte a sequence may follow, and nothing else.
    if index.size not in (offsets[-1], offsets[-1] + sequences):
        found = f"{index.size} bytes, and {sequences} sequences with {bounds} document bounds take {offsets[-1]}"
        raise damaged(prefix, path, found)
    lengths, pointers, documents = (
        np.frombuffer(index, kind, count, offset) for (kind, count), offset in zip(parts, offsets)
    )
    try:
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        _refuse_disorder(prefix, lengths, pointers, starts * dtype.itemsize, documents)
        return dtype, starts[documents]
    except MemoryError as error:
        raise damaged(
            prefix, path, f"{sequences} sequences, whose places do not fit into memory"
        ) from error


def read_counts(prefix: str | Path) -> tuple[np.dtype, int]:
    """Return the token type and the number of documents, from the header of the index alone.

    Raises DataError for a header that is damaged or of another format.
    """
    with idx_path(prefix).open("rb") as file:
        dtype, _, bounds = _header(prefix, np.frombuffer(file.read(_HEADER.size), np.uint8))
    return dtype, bounds - 1


def damaged(prefix: str | Path, path: Path, found: str) -> DataError:
    """The error for a store one of whose files has ``found`` in it."""
    return DataError(
        f"token store {prefix}: {path} has {found}. Set --data-path, or {write_again(prefix)}."
    )


def write_again(prefix: str | Path) -> str:
    """The remedy for a store that cannot be read."""
    return f"write it with python tools/prepare_data.py --input FILES --output-prefix {prefix}"


def _header(prefix: str | Path, index: np.ndarray) -> tuple[np.dtype, int, int]:
    """The token type, N and M + 1."""
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
            f"{magic!r} for its first {len(_MAGIC)} bytes, and Megatron writes {_MAGIC!r}",
        )
    if version != _VERSION:
        raise damaged(prefix, path, f"format version {version}, and only {_VERSION} is known")
    if code not in _TYPES:
        known = ", ".join(f"{known} {dtype.name}" for known, dtype in _TYPES.items())
        raise damaged(prefix, path, f"token type {code}, and token ids are one of: {known}")
    return _TYPES[code], sequences, bounds


def _refuse_disorder(
    prefix: str | Path,
    lengths: np.ndarray,
    pointers: np.ndarray,
    expected: np.ndarray,
    documents: np.ndarray,
) -> None:
    """A document is read as one run of tokens, so its sequences must follow each other, as Megatron writes them."""
    if np.any(lengths < 0) or np.any(pointers != expected[:-1]):
        raise damaged(prefix, idx_path(prefix), "sequences that do not lie one after another")
    # Compared and not subtracted: the difference of two damaged bounds may wrap around.
    if (
        list(documents[:1]) != [0]
        or documents[-1] != len(lengths)
        or np.any(documents[1:] < documents[:-1])
    ):
        found = f"document bounds that do not rise from 0 to its {len(lengths)} sequences"
        raise damaged(prefix, idx_path(prefix), found)
