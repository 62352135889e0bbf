"""A token store has one fingerprint wherever it lies, and another one as soon as its tokens are others."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ring.data import fingerprint as module
from megatron_ring.data.fingerprint import fingerprint
from megatron_ring.data.manifest import Manifest, manifest_path, write_manifest
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


def test_it_counts_and_does_not_depend_on_the_path(tmp_path):
    here = write(tmp_path / "a", DOCUMENTS)
    there = write(tmp_path / "moved" / "b", DOCUMENTS)
    assert fingerprint(here)["prefix"] == str(here)
    assert (fingerprint(here)["documents"], fingerprint(here)["tokens"]) == (3, 8)
    assert content(here) == content(there)


@pytest.mark.parametrize(
    "documents",
    [
        [[1, 2, 3], [4], [5, 6, 7, 9]],  # one token, and no count
        [[1, 2], [3, 4], [5, 6, 7, 8]],  # the border between documents alone
        [[5, 6, 7, 8], [1, 2, 3], [4]],
        DOCUMENTS * 2,
    ],
)
def test_other_tokens_have_another(documents, tmp_path):
    assert content(write(tmp_path / "a", DOCUMENTS)) != content(write(tmp_path / "b", documents))


def test_a_manifest_counts_by_what_it_states_of_the_text(tmp_path):
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


def test_a_store_of_any_size_costs_a_bounded_number_of_bytes(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a", DOCUMENTS)
    size = 1 << 40
    os.truncate(bin_path(prefix), size)
    read = []
    pread = os.pread
    monkeypatch.setattr(module.os, "pread", lambda *of: read.append(of[1:]) or pread(*of))
    assert fingerprint(prefix)["tokens"] == size // 2
    assert sum(count for count, _ in read) < 4 << 20
    assert max(offset + count for count, offset in read) == size, "its end is read too"


def test_blocks_in_the_middle_of_a_large_store_count(tmp_path):
    generator = np.random.default_rng(0)
    documents = generator.integers(0, 1000, (64, 16384))
    first, second = write(tmp_path / "a", documents), write(tmp_path / "b", np.roll(documents, 1))
    assert content(first) != content(second)


@pytest.mark.parametrize("damage", ["gone", "pipe"])
def test_what_cannot_be_read_is_a_data_error(damage, tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    bin_path(prefix).unlink()
    if damage == "pipe":
        os.mkfifo(bin_path(prefix))
    with pytest.raises(DataError, match="--data-path"):
        fingerprint(prefix)


def test_a_copy_with_its_manifest_has_the_same(tmp_path):
    prefix = write(tmp_path / "a", DOCUMENTS)
    write_manifest(prefix, Manifest("t", 9, 3, 8, 40))
    (tmp_path / "copy").mkdir()
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        shutil.copy(path, tmp_path / "copy" / path.name)
    assert content(prefix) == content(tmp_path / "copy" / "a")
