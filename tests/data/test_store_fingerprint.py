"""The fingerprint of a token store: independent of its path, different for different tokens."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data import store_fingerprint
from megatron_ring.data.manifest import Manifest, manifest_path, write_manifest
from megatron_ring.data.store_fingerprint import fingerprint
from megatron_ring.data.token_index import idx_path
from megatron_ring.data.tokens import TokenStoreWriter, bin_path
from megatron_ring.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with TokenStoreWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def content(prefix: Path) -> dict:
    return {key: value for key, value in fingerprint(prefix).items() if key != "prefix"}


def test_a_fingerprint_has_counts_and_does_not_depend_on_the_path(tmp_path):
    first = write(tmp_path / "a", DOCUMENTS)
    moved = write(tmp_path / "moved" / "b", DOCUMENTS)
    assert fingerprint(first)["prefix"] == str(first)
    assert (fingerprint(first)["documents"], fingerprint(first)["tokens"]) == (3, 8)
    assert content(first) == content(moved)


@pytest.mark.parametrize(
    "documents",
    [
        [[1, 2, 3], [4], [5, 6, 7, 9]],  # one token differs, all counts are equal
        [[1, 2], [3, 4], [5, 6, 7, 8]],  # only the boundary between documents differs
        [[5, 6, 7, 8], [1, 2, 3], [4]],
        DOCUMENTS * 2,
    ],
)
def test_different_tokens_have_different_fingerprints(documents, tmp_path):
    assert content(write(tmp_path / "a", DOCUMENTS)) != content(write(tmp_path / "b", documents))


def test_only_fields_about_the_text_affect_the_fingerprint_of_a_manifest(tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    without = fingerprint(prefix)
    assert without["manifest_sha256"] == ""
    manifest = {"tokenizer_sha256": "t", "vocab_size": 9, "documents": 3, "tokens": 8, "bytes": 40}
    write_manifest(prefix, Manifest(**manifest))
    first = fingerprint(prefix)
    assert first["sampled_sha256"] == without["sampled_sha256"]
    write_manifest(prefix, Manifest(**manifest, skipped=1))
    assert fingerprint(prefix) == first
    write_manifest(prefix, Manifest(**manifest | {"bytes": 41}))
    assert fingerprint(prefix)["manifest_sha256"] != first["manifest_sha256"]


def test_the_bytes_read_are_bounded_at_any_store_size(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a", DOCUMENTS)
    size = 1 << 40
    os.truncate(bin_path(prefix), size)
    read = []
    pread = os.pread

    def recording_pread(descriptor: int, count: int, offset: int) -> bytes:
        read.append((count, offset))
        return pread(descriptor, count, offset)

    monkeypatch.setattr(store_fingerprint.os, "pread", recording_pread)
    assert fingerprint(prefix)["tokens"] == size // 2
    assert sum(count for count, _ in read) < 4 << 20
    assert max(offset + count for count, offset in read) == size, "the end of the file is read too"


def test_blocks_in_the_middle_of_a_large_store_affect_the_fingerprint(tmp_path):
    generator = np.random.default_rng(0)
    documents = generator.integers(0, 1000, (64, 16384))
    first = write(tmp_path / "a", documents)
    second = write(tmp_path / "b", np.roll(documents, 1))
    assert content(first) != content(second)


@pytest.mark.parametrize("damage", ["missing", "pipe"])
def test_a_store_that_cannot_be_read_is_a_data_error(damage, tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    bin_path(prefix).unlink()
    if damage == "pipe":
        os.mkfifo(bin_path(prefix))
    with pytest.raises(DataError, match="--data-path"):
        fingerprint(prefix)


def test_a_copy_with_its_manifest_has_the_same_fingerprint(tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    write_manifest(prefix, Manifest("t", 9, 3, 8, 40))
    (tmp_path / "copy").mkdir()
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        shutil.copy(path, tmp_path / "copy" / path.name)
    assert content(prefix) == content(tmp_path / "copy" / "a")
