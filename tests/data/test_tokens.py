"""The token store: Megatron's bytes, round trips, and an error for every kind of damage."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.data.token_index import LONGEST_SEQUENCE
from megatron_ring.data.tokens import TokenStore, TokenStoreWriter, token_dtype
from megatron_ring.errors import DataError

TYPES = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16)

# Documents [5, 6, 7] and [8, 1] in uint16, as Megatron-core 0.16's IndexedDatasetBuilder writes
# them.
MEGATRON_BIN = bytes.fromhex("0500 0600 0700 0800 0100")
MEGATRON_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<QB", 1, 8)  # version, uint16
    + struct.pack("<QQ", 2, 3)  # sequences, document bounds
    + struct.pack("<ii", 3, 2)  # lengths
    + struct.pack("<qq", 0, 6)  # pointers
    + struct.pack("<qqq", 0, 1, 2)  # documents
)


@pytest.fixture
def prefix(tmp_path) -> Path:
    """An intact store of the two documents above."""
    (tmp_path / "P.bin").write_bytes(MEGATRON_BIN)
    (tmp_path / "P.idx").write_bytes(MEGATRON_IDX)
    return tmp_path / "P"


def test_the_files_are_megatrons_byte_for_byte(tmp_path):
    with TokenStoreWriter(tmp_path / "P", token_dtype(4096)) as writer:
        writer.add_document([5, 6, 7])
        writer.add_document(np.array([8, 1]))
    assert (tmp_path / "P.bin").read_bytes() == MEGATRON_BIN
    assert (tmp_path / "P.idx").read_bytes() == MEGATRON_IDX


def test_megatrons_files_are_read(prefix):
    store = TokenStore(prefix)
    assert len(store) == 2
    assert store.lengths.tolist() == [3, 2]
    assert [store.document(i).tolist() for i in range(2)] == [[5, 6, 7], [8, 1]]


def test_a_document_stored_as_several_sequences_is_read_whole(prefix):
    Path(f"{prefix}.idx").write_bytes(
        MEGATRON_IDX[:18]
        + struct.pack("<QQ", 3, 3)
        + struct.pack("<3i3q3q", 1, 2, 2, 0, 2, 6, 0, 2, 3)
    )
    assert TokenStore(prefix).document(0).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65499, "uint16"), (65500, "int32")]
)
def test_token_type_follows_megatrons_rule(vocab_size, dtype):
    assert token_dtype(vocab_size).name == dtype


@settings(max_examples=50)
@given(data=st.data(), dtype=st.sampled_from(TYPES))
def test_documents_come_back_as_they_were_written(store_of, data, dtype):
    ids = st.integers(np.iinfo(dtype).min, np.iinfo(dtype).max)
    documents = data.draw(st.lists(st.lists(ids), min_size=1).filter(any))
    store = store_of(documents, dtype)
    assert store.dtype == dtype
    assert store.lengths.tolist() == [len(document) for document in documents]
    assert [store.document(i).tolist() for i in range(len(store))] == documents


def write_interrupted(prefix: Path) -> None:
    with TokenStoreWriter(prefix, token_dtype(4096)) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_no_files(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(tmp_path / "P")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_store(prefix):
    with pytest.raises(KeyboardInterrupt):
        write_interrupted(prefix)
    assert TokenStore(prefix).document(0).tolist() == [5, 6, 7]


def test_a_document_too_long_for_the_format_is_refused(tmp_path):
    too_long = np.broadcast_to(np.uint16(1), LONGEST_SEQUENCE + 1)
    message = r"a document of 2147483648 tokens .* at most 2147483647"
    with (
        TokenStoreWriter(tmp_path / "P", token_dtype(4096)) as writer,
        pytest.raises(DataError, match=message),
    ):
        writer.add_document(too_long)


@pytest.mark.parametrize("ids", [[0, 65536], [-1]])
def test_ids_that_the_type_cannot_hold_are_refused(ids, tmp_path):
    with (
        TokenStoreWriter(tmp_path / "P", np.uint16) as writer,
        pytest.raises(DataError, match="0 to 65535"),
    ):
        writer.add_document(ids)


def test_a_store_of_another_type_is_not_appended(prefix, tmp_path):
    with (
        TokenStoreWriter(tmp_path / "P", np.int32) as writer,
        pytest.raises(DataError, match="uint16"),
    ):
        writer.add_store(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(prefix, suffix):
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(
        DataError,
        match=rf"no .*P\.{suffix}\. .*Set --data-path, or write it with .*prepare_data\.py",
    ):
        TokenStore(prefix)


def test_a_prefix_with_a_suffix_is_refused_with_the_rule(prefix):
    with pytest.raises(
        DataError, match=r"no .*P\.bin\.bin and no .*P\.bin\.idx\. .*--data-path .*without a suffix"
    ):
        TokenStore(f"{prefix}.bin")


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_the_remedy_for_a_missing_store_is_a_command_that_writes_it(suffix, tmp_path):
    with pytest.raises(DataError) as raised:
        TokenStore(f"{tmp_path}/none{suffix}")
    command = re.search(r"python tools/prepare_data\.py (.*)\.$", str(raised.value))[1]
    assert command == f"--input FILES --output-prefix {tmp_path}/none"


DAMAGED_INDICES = {
    "empty": (b"", r"P\.idx has 0 bytes, and its header alone takes 34"),
    "truncated in the header": (
        MEGATRON_IDX[:33],
        r"P\.idx has 33 bytes, and its header alone takes 34",
    ),
    "truncated in the arrays": (
        MEGATRON_IDX[:-1],
        r"81 bytes, and 2 sequences with 3 document bounds take 82",
    ),
    "bad magic": (b"PK" + MEGATRON_IDX[2:], r"b'PKIDIDX.*Megatron writes b'MMIDIDX"),
    "version": (
        MEGATRON_IDX[:9] + struct.pack("<Q", 2) + MEGATRON_IDX[17:],
        "format version 2, and only 1",
    ),
    "float tokens": (
        MEGATRON_IDX[:17] + b"\x07" + MEGATRON_IDX[18:],
        "token type 7, .*one of: 1 uint8, .*8 uint16",
    ),
    "a gap": (
        MEGATRON_IDX[:-32] + struct.pack("<q", 8) + MEGATRON_IDX[-24:],
        "not contiguous",
    ),
    "bounds": (
        MEGATRON_IDX[:-8] + struct.pack("<q", 1),
        "bounds that do not increase from 0 to its 2 sequences",
    ),
    "no tokens": (MEGATRON_IDX[:18] + struct.pack("<QQq", 0, 1, 0), r"P\.idx has no tokens"),
}


@pytest.mark.parametrize(
    ("content", "message"), DAMAGED_INDICES.values(), ids=DAMAGED_INDICES.keys()
)
def test_damage_of_an_index_is_described(prefix, content, message):
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){message}.*Set --data-path"):
        TokenStore(prefix)


@pytest.mark.parametrize(
    "content",
    [b"", MEGATRON_BIN[:-1], MEGATRON_BIN + b"\x00"],
    ids=["empty", "truncated", "longer"],
)
def test_a_token_file_of_the_wrong_size_is_refused(prefix, content):
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(
        DataError, match=rf"P\.bin has {len(content)} bytes, .* 10 \(5 tokens of uint16\)"
    ):
        TokenStore(prefix)


def test_tokens_that_are_truncated_after_opening_are_refused(prefix):
    store = TokenStore(prefix)
    os.truncate(f"{prefix}.bin", 4)
    with pytest.raises(
        DataError, match=r"P\.bin has 4 bytes, and had 10 when it was opened: .*Set --data-path"
    ):
        store.document(0)


@settings(max_examples=200)
@given(at=st.integers(0, len(MEGATRON_IDX) - 1), byte=st.integers(0, 255))
def test_a_wrong_byte_in_the_index_is_refused_or_harmless(tmp_path_factory, at, byte):
    prefix = tmp_path_factory.getbasetemp() / "flipped"
    content = MEGATRON_IDX[:at] + bytes([byte]) + MEGATRON_IDX[at + 1 :]
    Path(f"{prefix}.bin").write_bytes(MEGATRON_BIN)
    Path(f"{prefix}.idx").write_bytes(content)
    is_unchanged = content == MEGATRON_IDX
    is_int16 = content[17] == 3  # as wide as uint16, so that nothing else differs
    is_other_legal_bound = at == len(MEGATRON_IDX) - 16 and content[-16] in (0, 2)
    if is_unchanged or is_int16 or is_other_legal_bound:
        assert TokenStore(prefix).lengths.sum() == 5
    else:
        with pytest.raises(DataError):
            TokenStore(prefix)
