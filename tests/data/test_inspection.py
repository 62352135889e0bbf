"""Verifying a store: what opening cannot see is found and named."""

import pytest

from megatron_ring.data.inspection import verify
from megatron_ring.data.manifest import Manifest
from megatron_ring.errors import DataError


def manifest(documents: int, tokens: int) -> Manifest:
    return Manifest("", 320, documents, tokens, 1, end_of_document=1)


def test_a_whole_store_is_verified(store_of, tokenizer):
    verify(store_of([[5, 6, 1], [7, 1]]), manifest(2, 5), tokenizer)


def test_a_store_that_megatron_wrote_may_end_documents_in_any_way(store_of, tokenizer):
    verify(store_of([[5, 6], [], [1, 1]]), None, tokenizer)


def test_another_count_than_the_manifests_is_named(store_of, tokenizer):
    with pytest.raises(
        DataError,
        match=r"(?s)2 documents, and its manifest tells of 3.*5 tokens, and .* tells of 6",
    ):
        verify(store_of([[5, 6, 1], [7, 1]]), manifest(3, 6), tokenizer)


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ([400, 1], "has ids from 1 to 400, and the tokenizer has 0 to 319"),
        ([5, 6], r"has 0 end-of-document ids \(1\), and one, at its end"),
        ([5, 1, 6, 1], r"has 2 end-of-document ids"),
        ([], "has 0 end-of-document ids"),
    ],
)
def test_a_bad_document_is_named(store_of, tokenizer, document, fault):
    with pytest.raises(DataError, match=f"P: document 1 {fault}"):
        verify(store_of([[5, 1], document]), manifest(2, 2 + len(document)), tokenizer)


def test_only_the_first_few_are_named(store_of, tokenizer):
    with pytest.raises(DataError) as caught:
        verify(store_of([[5]] * 9), manifest(9, 9), tokenizer)
    assert len(caught.value.problems) == 3
