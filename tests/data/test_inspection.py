"""Inspection: faults that opening a store does not notice are named, and the length histogram."""

import numpy as np
import pytest

from megatron_ring.data.inspection import draw_histogram, length_histogram, verify
from megatron_ring.data.manifest import Manifest
from megatron_ring.errors import DataError


def manifest(documents: int, tokens: int) -> Manifest:
    return Manifest("", 320, documents, tokens, 1, end_of_document=1)


def test_an_intact_store_passes(store_of, tokenizer):
    verify(store_of([[5, 6, 1], [7, 1]]), manifest(2, 5), tokenizer)


def test_document_ends_of_a_store_without_manifest_are_not_checked(store_of, tokenizer):
    verify(store_of([[5, 6], [], [1, 1]]), None, tokenizer)


def test_counts_that_differ_from_the_manifest_are_named(store_of, tokenizer):
    with pytest.raises(DataError, match=r"(?s)2 documents, .* 3\b.*5 tokens, .* 6\b"):
        verify(store_of([[5, 6, 1], [7, 1]]), manifest(3, 6), tokenizer)


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ([400, 1], "has ids from 1 to 400, .* 0 to 319"),
        ([5, 6], r"has 0 end-of-document ids \(1\) and must have exactly one, at its end"),
        ([5, 1, 6, 1], r"has 2 end-of-document ids"),
        ([], "has 0 end-of-document ids"),
    ],
)
def test_a_faulty_document_is_named(store_of, tokenizer, document, fault):
    with pytest.raises(DataError, match=f"P: document 1 {fault}"):
        verify(store_of([[5, 1], document]), manifest(2, 2 + len(document)), tokenizer)


def test_at_most_three_faulty_documents_are_named(store_of, tokenizer):
    with pytest.raises(DataError) as caught:
        verify(store_of([[5]] * 9), manifest(9, 9), tokenizer)
    assert len(caught.value.problems) == 3


def test_a_bin_of_the_histogram_begins_at_a_power_of_two():
    assert length_histogram(np.array([4, 7, 8, 8, 31])) == [(4, 2), (8, 2), (16, 1)]
    assert length_histogram(np.array([0, 1, 2])) == [(1, 2), (2, 1)]
    assert length_histogram(np.array([2**30 - 1, 2**30])) == [(2**29, 1), (2**30, 1)]


def test_the_histogram_is_drawn_with_bars():
    assert draw_histogram(np.array([1, 1, 4])).splitlines() == [
        "tokens, from   documents",
        "           1             2  " + "#" * 40,
        "           2             0",
        "           4             1  " + "#" * 20,
    ]
