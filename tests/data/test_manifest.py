"""P.json: written, read, and compared with the tokenizer."""

import json

import pytest

from megatron_ring.data.manifest import (
    Manifest,
    check_tokenizer,
    manifest_path,
    read_manifest,
    tokenizer_path,
    write_manifest,
)
from megatron_ring.data.tokenizer_training import train_tokenizer
from megatron_ring.errors import DataError
from tests.data.text import TEXT


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = Manifest("ab" * 32, vocab_size=4096, documents=2, tokens=10, bytes=35)
    write_manifest(tmp_path / "P", manifest)
    assert read_manifest(tmp_path / "P") == manifest
    assert manifest.bytes_per_token == 3.5


def test_without_a_manifest_any_tokenizer_is_accepted(tmp_path, tokenizer):
    assert read_manifest(tmp_path / "P") is None
    check_tokenizer(tmp_path / "P", tokenizer)


def test_a_tokenizer_other_than_the_stores_is_refused(tmp_path, tokenizer):
    write_manifest(tmp_path / "P", Manifest(tokenizer.fingerprint, tokenizer.vocab_size, 1, 2, 3))
    check_tokenizer(tmp_path / "P", tokenizer)
    with pytest.raises(
        DataError, match=r"a tokenizer of 320 ids .*has 300 .*Set --tokenizer-model"
    ):
        check_tokenizer(tmp_path / "P", train_tokenizer([TEXT], 300))


def test_an_end_of_document_id_other_than_the_stores_is_refused(tmp_path, tokenizer):
    write_manifest(tmp_path / "P", Manifest(tokenizer.fingerprint, 320, 1, 2, 3, end_of_document=0))
    with pytest.raises(
        DataError,
        match=r"ends documents with id 0, .* with 1\. Set --tokenizer-model",
    ):
        check_tokenizer(tmp_path / "P", tokenizer)


def test_a_manifest_older_than_the_end_of_document_field_is_read(tmp_path, tokenizer):
    old = '{"tokenizer_sha256": "%s", "vocab_size": 320, "documents": 1, "tokens": 2, "bytes": 3}'
    manifest_path(tmp_path / "P").write_text(old % tokenizer.fingerprint)
    check_tokenizer(tmp_path / "P", tokenizer)


GOOD = {"tokenizer_sha256": "0", "vocab_size": 9, "documents": 1, "tokens": 5, "bytes": 5}
BAD_VALUES = [
    json.dumps(GOOD | {key: value})
    for key, value in (
        ("documents", "1"),
        ("tokens", 0),
        ("vocab_size", -1),
        ("bytes", 1.5),
        ("skipped", [1]),
        ("end_of_document", 2**70),
        ("left_out", {"*.png": "3"}),
    )
]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tokens": 5}', '{"tokens": ', "[" * 100_000, *BAD_VALUES]
)
def test_the_error_for_a_damaged_manifest_lists_its_fields(tmp_path, content):
    manifest_path(tmp_path / "P").write_text(content)
    with pytest.raises(
        DataError,
        match=r"P\.json is not one JSON object of tokenizer_sha256, .*end_of_document.*Delete it",
    ):
        read_manifest(tmp_path / "P")


@pytest.mark.parametrize("prefix", [".", "/", ""])
def test_a_folder_as_prefix_is_refused(prefix):
    with pytest.raises(DataError, match="is a folder, .*Set --data-path or --output-prefix"):
        tokenizer_path(prefix)
