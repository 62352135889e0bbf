"""The index reader on arbitrary bytes: DataError, or exactly the documents they encode."""

import struct
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.data.token_index import index_bytes
from megatron_ring.data.tokens import TokenStore
from megatron_ring.errors import DataError


def joined(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12], [13, 14]]
TOKENS = np.array(joined(DOCUMENTS), dtype="<u2")
INDEX = index_bytes([len(document) for document in DOCUMENTS], TOKENS.dtype)

# Offsets of flipped bytes, and numbers that have broken readers of other formats.
OFFSETS = st.integers(0, len(INDEX) - 1)
EXTREME_NUMBERS = st.sampled_from(
    [0, 1, 2**31 - 1, 2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1, len(TOKENS), len(DOCUMENTS)]
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    TOKENS.tofile(folder / "P.bin")
    return folder / "P"


def reference_documents(index: bytes) -> list[list[int]]:
    """Read the documents of an index with struct alone, independently of the reader under test."""
    code, sequences, bounds = struct.unpack_from("<BQQ", index, 17)
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    values = struct.unpack_from(f"<{sequences}i{sequences}q{bounds}q", index, 34)
    lengths = values[:sequences]
    pointers = values[sequences : 2 * sequences]
    first_sequences = values[2 * sequences :]
    read = [
        list(struct.unpack_from(f"<{length}{kind}", TOKENS.tobytes(), pointer))
        for length, pointer in zip(lengths, pointers)
    ]
    return [joined(read[start:stop]) for start, stop in pairwise(first_sequences)]


def check(prefix: Path, index: bytes) -> None:
    """Check that the index is refused, or read completely and exactly."""
    Path(f"{prefix}.idx").write_bytes(index)
    try:
        store = TokenStore(prefix)
    except DataError:
        return
    documents = [store.document(i).tolist() for i in range(len(store))]
    assert documents == reference_documents(index)
    assert store.lengths.tolist() == [len(document) for document in documents]
    assert joined(documents) == np.frombuffer(TOKENS.tobytes(), store.dtype).tolist()


def test_an_intact_index_is_read(prefix):
    check(prefix, INDEX)
    assert reference_documents(INDEX) == DOCUMENTS
    assert len(TokenStore(prefix)) == len(DOCUMENTS)


@settings(max_examples=150)
@given(size=st.integers(0, len(INDEX) - 1))
def test_a_truncated_index_is_refused(prefix, size):
    Path(f"{prefix}.idx").write_bytes(INDEX[:size])
    with pytest.raises(DataError, match="Set --data-path"):
        TokenStore(prefix)


@settings(max_examples=150)
@given(more=st.binary(min_size=1, max_size=40).filter(lambda more: len(more) != len(DOCUMENTS)))
def test_extra_bytes_at_the_end_are_refused(prefix, more):
    Path(f"{prefix}.idx").write_bytes(INDEX + more)
    with pytest.raises(DataError, match="Set --data-path"):
        TokenStore(prefix)


@settings(max_examples=500)
@given(flips=st.lists(st.tuples(OFFSETS, st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_refused_or_read_exactly(prefix, flips):
    index = bytearray(INDEX)
    for at, flip in flips:
        index[at] ^= flip
    check(prefix, bytes(index))


@settings(max_examples=500)
@given(
    values=st.lists(
        st.tuples(st.integers(18, len(INDEX) - 8), EXTREME_NUMBERS), min_size=1, max_size=3
    )
)
def test_extreme_numbers_are_refused_or_read_exactly(prefix, values):
    index = bytearray(INDEX)
    for at, value in values:
        struct.pack_into("<Q", index, at, value)
    check(prefix, bytes(index))


@settings(max_examples=300)
@given(content=st.binary(max_size=200), header=st.booleans())
def test_arbitrary_bytes_are_refused_or_read_exactly(prefix, content, header):
    check(prefix, INDEX[:18] + content if header else content)


def test_bounds_whose_differences_wrap_around_are_refused(prefix):
    bounds = struct.pack("<5q", 0, 2**63 - 1, -(2**63), -1, len(DOCUMENTS))
    counts = struct.pack("<QQ", len(DOCUMENTS), 5)
    Path(f"{prefix}.idx").write_bytes(
        INDEX[:18] + counts + INDEX[34 : 34 + 12 * len(DOCUMENTS)] + bounds
    )
    with pytest.raises(DataError, match="bounds that do not increase"):
        TokenStore(prefix)


@pytest.mark.parametrize(
    "counts", [(2**40, 2**40 + 1), (2**64 - 1, 2**64 - 1), (5, 2**61), (2**61, 6)]
)
def test_a_huge_count_allocates_no_memory(prefix, counts):
    Path(f"{prefix}.idx").write_bytes(INDEX[:18] + struct.pack("<QQ", *counts) + INDEX[34:])
    tracemalloc.start()
    with pytest.raises(DataError):
        TokenStore(prefix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
