"""The token store: Megatron's ``P.bin`` and ``P.idx``, byte for byte, written once, read by mmap.

``P.bin`` holds the tokens of all documents, one after another; ``P.idx`` holds where each document
begins (token_index.py). Neither records the tokenizer that wrote the store: see manifest.py.
"""

import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ring.data.map_cache import FileState, MapCache, readable
from megatron_ring.data.token_index import (
    LONGEST_SEQUENCE,
    damaged,
    idx_path,
    index_bytes,
    prepare_command,
    read_index,
)
from megatron_ring.errors import DataError
from megatron_ring.untrusted import create

_COPY_CHUNK_BYTES = 1 << 20


def bin_path(prefix: str | Path) -> Path:
    """Return the path of ``P.bin``."""
    return Path(f"{prefix}.bin")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return Megatron's type for ids below ``vocab_size``: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class TokenStoreWriter:
    """Writes a store document by document, under temporary names until the block ends.

    An exception inside the ``with`` block leaves no files, and an older store unchanged.

    >>> with TokenStoreWriter(prefix, token_dtype(4096)) as writer:  # doctest: +SKIP
    ...     writer.add_document([17, 4, 1])
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        # An array of 4 bytes per document, because there may be many millions.
        self._lengths = array("i")
        self._temporary_bin = Path(f"{prefix}.bin.tmp")
        self._temporary_idx = Path(f"{prefix}.idx.tmp")

    def __enter__(self) -> "TokenStoreWriter":
        self._temporary_bin.parent.mkdir(parents=True, exist_ok=True)
        self._tokens = create(self._temporary_bin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        self._tokens.close()
        try:
            if kind is None:
                self._publish()
        finally:
            self._temporary_bin.unlink(missing_ok=True)
            self._temporary_idx.unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of token ids.

        Raises DataError where it is longer than the format can record, or has ids that the store's
        type cannot hold.
        """
        if len(tokens) > LONGEST_SEQUENCE:
            raise DataError(
                f"a document of {len(tokens)} tokens does not fit {idx_path(self._prefix)}, whose "
                f"documents have at most {LONGEST_SEQUENCE} tokens. Split the document."
            )
        tokens = np.asarray(tokens)
        ids = np.iinfo(self._dtype)
        if tokens.size and (tokens.min() < ids.min or tokens.max() > ids.max):
            raise DataError(
                f"token ids from {tokens.min()} to {tokens.max()} do not fit {self._dtype}, which "
                f"holds {ids.min} to {ids.max}. Prepare the store with a tokenizer of at most "
                f"{ids.max + 1} ids."
            )
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))

    def add_store(self, prefix: str | Path) -> None:
        """Append every document of another store. Raises DataError if its token type differs."""
        dtype, starts = read_index(prefix)
        if dtype != self._dtype:
            raise DataError(
                f"token store {prefix} has tokens of type {dtype} and cannot be appended to one of "
                f"type {self._dtype}."
            )
        with bin_path(prefix).open("rb") as tokens:
            shutil.copyfileobj(tokens, self._tokens, _COPY_CHUNK_BYTES)
        self._lengths.frombytes(np.diff(starts).astype(np.int32).tobytes())

    def _publish(self) -> None:
        with create(self._temporary_idx) as index:
            index.write(index_bytes(self._lengths, self._dtype))
        # The old index is removed first and the new one is renamed last, so that at no moment an
        # index lies beside tokens that it does not describe.
        idx_path(self._prefix).unlink(missing_ok=True)
        self._temporary_bin.replace(bin_path(self._prefix))
        self._temporary_idx.replace(idx_path(self._prefix))


class TokenStore:
    """A store opened for reading: the starts of documents are in memory, the tokens are mapped.

    ``lengths`` is (documents,) int64, the tokens of each document. Stores that share ``maps`` share
    its limit on open files. Raises DataError for a store that is missing, empty, damaged, or of
    another format.
    """

    def __init__(self, prefix: str | Path, maps: MapCache | None = None):
        self.prefix = prefix
        _refuse_missing(prefix)
        self._maps = MapCache(1) if maps is None else maps
        self.dtype, self._starts = self._maps.read(idx_path(prefix), lambda: read_index(prefix))
        self._state = _checked_state(prefix, int(self._starts[-1]), self.dtype)
        self.lengths = np.diff(self._starts)
        self._bin = str(bin_path(prefix))
        self._tokens()

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document ``i``: (lengths[i],), a read-only view, to be read at once.

        The view has the store's own type. Raises DataError where the file was truncated or
        rewritten since it was opened.
        """
        assert 0 <= i < len(self)
        return self._tokens()[self._starts[i] : self._starts[i + 1]]

    def where(self, tokens: np.ndarray) -> str:
        """Describe where ``tokens``, a slice of what ``document`` returned, begins in the file."""
        byte = tokens.ctypes.data - tokens.base.ctypes.data
        document = np.searchsorted(self._starts, byte // self.dtype.itemsize, side="right") - 1
        return f"document {document} at byte {byte} of {bin_path(self.prefix)}"

    def _tokens(self) -> np.ndarray:
        """Return all tokens, after a check that the file still has every byte.

        Reading a map beyond the end of its file would end the process with SIGBUS.
        """
        mapped, tokens = self._maps.map(self._bin, self._state, self.dtype)
        size = mapped.size()
        if size < self._state.size:
            raise damaged(
                self.prefix,
                Path(self._bin),
                f"{size} bytes, and had {self._state.size} when it was opened: it was truncated",
            )
        return tokens


def missing_files(prefix: str | Path) -> list[str]:
    """Return which of the two files of a store do not exist.

    Raises DataError for one whose folder cannot be read.
    """
    missing = []
    for path in (bin_path(prefix), idx_path(prefix)):
        with readable(path):
            if not path.is_file():
                missing.append(str(path))
    return missing


def _refuse_missing(prefix: str | Path) -> None:
    if missing := missing_files(prefix):
        raise DataError(
            f"token store {prefix}: no {' and no '.join(missing)}. A store is two files, P.bin and "
            "P.idx, and --data-path takes P, without a suffix. Set --data-path, or "
            f"write it with {prepare_command(prefix)}."
        )


def _checked_state(prefix: str | Path, tokens: int, dtype: np.dtype) -> FileState:
    """Return the state of ``P.bin`` after a check that its size is that of ``tokens`` tokens."""
    with readable(bin_path(prefix)):
        state = FileState.of(bin_path(prefix))
    expected = tokens * dtype.itemsize
    if not tokens:
        raise damaged(prefix, idx_path(prefix), "no tokens")
    if state.size != expected:
        raise damaged(
            prefix,
            bin_path(prefix),
            f"{state.size} bytes, and {idx_path(prefix)} expects {expected} "
            f"({tokens} tokens of {dtype.name})",
        )
    return state
