"""Packed calls compute all unmasked tiles, each once, with sequences that leave no gap."""

import itertools

import torch
from hypothesis import example, given

from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.tiles import TileKind, Tiling, Window
from megatron_ring.kernels.attention.varlen import VarlenCall
from tests.kernels.attention.test_tiles import (
    any_key_ranges,
    causal,
    covered,
    in_window,
    key_ranges_of,
    packed,
    tilings,
)

BY_DOCUMENT = Tiling(1024, split_triangles=False, split_documents=True)


def computed_pairs(call: VarlenCall, shape: torch.Size) -> torch.Tensor:
    """Return the pairs that a packed call computes, by the window of each sequence."""
    computed_LM = torch.zeros(shape, dtype=torch.int64)
    inside = computed_LM[call.queries, call.keys]
    queries, keys = call.cu_seqlens(samples=1)
    for (start, stop), (first, last) in zip(itertools.pairwise(queries), itertools.pairwise(keys)):
        sequence = inside[start:stop, first:last]
        sequence += in_window(call.window, *sequence.shape)
    assert (queries[-1], keys[-1]) == inside.shape, "every query and key is in a sequence"
    return computed_LM


@given(any_key_ranges, tilings)
@example(causal(9), Tiling(4, False))
@example(
    packed([(3, 0, False), (0, 1, False), (5, 0, True)]), Tiling(8, False, split_documents=True)
)
@example(key_ranges_of([0, 2, 2, 2], [2, 2, 2, 4]), Tiling(8, False, split_documents=True))
def test_calls_and_masked_tiles_cover_what_the_tiles_cover(key_ranges: KeyRanges, tiling: Tiling):
    expected = covered(key_ranges, tiling, max(key_ranges.hi.tolist(), default=0))
    found = torch.zeros_like(expected)
    for call in key_ranges.varlen_calls(tiling):
        found += computed_pairs(call, expected.shape)
    for tile in key_ranges.tiles(tiling):
        if tile.kind is TileKind.MASKED:
            found[tile.queries, tile.keys] += key_ranges.visible(tile)
    assert torch.equal(found, expected)


def test_documents_are_one_call_with_a_sequence_each_and_one_for_unused_queries_or_keys():
    key_ranges = packed([(3, 0, False), (2, 0, True), (4, 1, False)])
    (call,) = key_ranges.varlen_calls(BY_DOCUMENT)
    assert (call.queries, call.keys, call.window) == (slice(0, 9), slice(0, 9), Window(right=0))
    assert call.lengths == ((3, 3), (1, 0), (1, 1), (0, 1), (4, 4))
    assert call.longest == (4, 4)


def test_the_example_of_the_module():
    lo = [0, 0, 0, 0, 4, 6, 6, 6]
    hi = [1, 2, 3, 4, 4, 7, 8, 9]
    (call,) = key_ranges_of(lo, hi).varlen_calls(BY_DOCUMENT)
    assert call.lengths == ((4, 4), (1, 0), (0, 2), (3, 3))


def test_samples_follow_end_to_end():
    (call,) = causal(4).varlen_calls(Tiling(1024, False))
    assert call.cu_seqlens(samples=3) == [[0, 4, 8, 12], [0, 4, 8, 12]]


def test_cumulative_lengths_are_copied_to_a_device_once():
    key_ranges = causal(4)
    (call,) = key_ranges.varlen_calls(Tiling(1024, False))
    cu_seqlens = key_ranges.cu_seqlens(call, 2, torch.device("cpu"))
    assert cu_seqlens.tolist() == [[0, 4, 8], [0, 4, 8]]
    assert cu_seqlens.dtype == torch.int32
    assert key_ranges.cu_seqlens(call, 2, torch.device("cpu")) is cu_seqlens
