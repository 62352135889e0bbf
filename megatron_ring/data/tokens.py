"""The token store: Megatron's ``P.bin`` and ``P.idx``, byte for byte, written once and read by memory map.

``P.bin`` is the tokens of all documents, one after another; ``P.idx`` says where each begins (token_index.py). Which
tokenizer a store was written with is in neither: see manifest.py.
"""

import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_ring.data.map_cache import FileState, OpenMaps, readable
from megatron_ring.data.token_index import (
    LONGEST_SEQUENCE,
    damaged,
    idx_path,
    index_bytes,
    read_index,
    write_again,
)
from megatron_ring.errors import DataError
from megatron_ring.untrusted import create

_COPIED_AT_ONCE = 1 << 20


def bin_path(prefix: str | Path) -> Path:
    """``P.bin``."""
    return Path(f"{prefix}.bin")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron stores ids below ``vocab_size`` in: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class TokenStoreWriter:
    """Writes a store document by document, under temporary names until it is left without an exception.

    >>> with TokenStoreWriter(prefix, token_dtype(4096)) as writer:  # doctest: +SKIP
    ...     writer.add_document([17, 4, 1])
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        # Four bytes a document, for there may be many millions.
        self._lengths = array("i")
        self._temporary_bin, self._temporary_idx = (
            Path(f"{prefix}.bin.tmp"),
            Path(f"{prefix}.idx.tmp"),
        )

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

        Raises DataError where it is longer than the format can count, or has ids that the store's
        type cannot hold.
        """
        if len(tokens) > LONGEST_SEQUENCE:
            raise DataError(
                f"a document of {len(tokens)} tokens does not fit {idx_path(self._prefix)}, which counts a document's "
                f"tokens up to {LONGEST_SEQUENCE}. Cut the document in two."
            )
        tokens, ids = np.asarray(tokens), np.iinfo(self._dtype)
        if tokens.size and (tokens.min() < ids.min or tokens.max() > ids.max):
            raise DataError(
                f"token ids from {tokens.min()} to {tokens.max()} do not fit {self._dtype}, which holds {ids.min} to "
                f"{ids.max}. Prepare the store with a tokenizer of at most {ids.max + 1} ids."
            )
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))

    def add_store(self, prefix: str | Path) -> None:
        """Append every document of another store. Raises DataError where it is of another type."""
        dtype, starts = read_index(prefix)
        if dtype != self._dtype:
            raise DataError(
                f"token store {prefix} has tokens of {dtype}, and is to be added to one of {self._dtype}."
            )
        with bin_path(prefix).open("rb") as tokens:
            shutil.copyfileobj(tokens, self._tokens, _COPIED_AT_ONCE)
        self._lengths.frombytes(np.diff(starts).astype(np.int32).tobytes())

    def _publish(self) -> None:
        with create(self._temporary_idx) as index:
            index.write(index_bytes(self._lengths, self._dtype))
        # An old index goes first and the new one comes last, so that no moment pairs an index with other tokens.
        idx_path(self._prefix).unlink(missing_ok=True)
        self._temporary_bin.replace(bin_path(self._prefix))
        self._temporary_idx.replace(idx_path(self._prefix))


class TokenStore:
    """A store opened for reading: where documents begin is kept in memory, the tokens are mapped.

    ``lengths`` is (documents,) int64, the tokens of each document. Raises DataError for a store that is missing,
    empty, damaged, or of another format. Stores that share ``maps`` have at most so many files open
    together.
    """

    def __init__(self, prefix: str | Path, maps: OpenMaps | None = None):
        self.prefix = prefix
        _refuse_missing(prefix)
        self._maps = OpenMaps(1) if maps is None else maps
        self.dtype, self._starts = self._maps.read(idx_path(prefix), lambda: read_index(prefix))
        self._state = _checked_state(prefix, int(self._starts[-1]), self.dtype)
        self.lengths = np.diff(self._starts)
        self._bin = str(bin_path(prefix))
        self._tokens()

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document ``i``: (lengths[i],), a read-only view in the store's own type, to be read at once.

        Raises DataError where the file has become shorter since it was opened, or was written
        again.
        """
        assert 0 <= i < len(self)
        return self._tokens()[self._starts[i] : self._starts[i + 1]]

    def where(self, tokens: np.ndarray) -> str:
        """In words where the first of ``tokens``, part of what ``document`` has returned, lies."""
        byte = tokens.ctypes.data - tokens.base.ctypes.data
        document = np.searchsorted(self._starts, byte // self.dtype.itemsize, side="right") - 1
        return f"document {document} at byte {byte} of {bin_path(self.prefix)}"

    def _tokens(self) -> np.ndarray:
        """All tokens, of which the file still has every byte: reading a map past the end of its
        file is a SIGBUS."""
        mapped, tokens = self._maps.map(self._bin, self._state, self.dtype)
        if (found := mapped.size()) < self._state.size:
            cut = f"{found} bytes, and had {self._state.size} when it was opened: it was cut since"
            raise damaged(self.prefix, Path(self._bin), cut)
        return tokens


def _refuse_missing(prefix: str | Path) -> None:
    if missing := [
        str(path) for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()
    ]:
        raise DataError(
            f"token store {prefix}: no {' and no '.join(missing)}. A store is two files, P.bin and P.idx, and "
            f"--data-path names them by P alone. Set --data-path, or {write_again(prefix)}."
        )


def _checked_state(prefix: str | Path, tokens: int, dtype: np.dtype) -> FileState:
    """The state of ``P.bin``, whose size must be that of so many tokens."""
    with readable(bin_path(prefix)):
        state = FileState.of(bin_path(prefix))
    expected = tokens * dtype.itemsize
    if not tokens:
        raise damaged(prefix, idx_path(prefix), "no tokens")
    if state.size != expected:
        counted = f"{idx_path(prefix)} tells of {expected} ({tokens} tokens of {dtype.name})"
        raise damaged(prefix, bin_path(prefix), f"{state.size} bytes, and {counted}")
    return state
