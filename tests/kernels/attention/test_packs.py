"""Packs are the tiles that need no mask: all of them, each once, in calls whose sequences run through without a gap."""

import itertools

import torch
from hypothesis import example, given

from megatron_ring.kernels.attention.packs import Pack
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.tiles import TileKind, Tiling
from tests.kernels.attention.test_runs import any_runs, causal, covered, packed, runs_of, tilings


def packed_pairs(pack: Pack, shape: torch.Size) -> torch.Tensor:
    """Which (query, key) pairs a packed call computes, causal from the bottom right as flash-attn has it."""
    computed_LM = torch.zeros(shape, dtype=torch.int64)
    inside = computed_LM[pack.queries, pack.keys]
    queries, keys = pack.bounds(samples=1)
    for (start, stop), (first, last) in zip(itertools.pairwise(queries), itertools.pairwise(keys)):
        sequence = inside[start:stop, first:last]
        surplus = sequence.shape[1] - sequence.shape[0]
        sequence += torch.ones_like(sequence).tril(
            surplus if pack.kind is TileKind.CAUSAL else sequence.shape[1]
        )
    assert (queries[-1], keys[-1]) == inside.shape, "every query and key is in a sequence"
    return computed_LM


@given(any_runs, tilings)
@example(causal(9), Tiling(4, False))
@example(
    packed([(3, 0, False), (0, 1, False), (5, 0, True)]), Tiling(8, False, part_documents=True)
)
@example(runs_of([0, 2, 2, 2], [2, 2, 2, 4]), Tiling(8, False, part_documents=True))
def test_packs_and_masked_tiles_cover_what_the_tiles_do(runs: KeyRanges, tiling: Tiling):
    whole = covered(runs, tiling, max(runs.hi.tolist(), default=0))
    masked = [tile for tile in runs.tiles(tiling) if tile.kind is TileKind.MASKED]
    found = sum(
        (packed_pairs(pack, whole.shape) for pack in runs.packs(tiling)), torch.zeros_like(whole)
    )
    for tile in masked:
        found[tile.queries, tile.keys] += runs.visible(tile)
    assert torch.equal(found, whole)


def test_documents_are_one_pack_with_a_sequence_each_and_one_for_what_nobody_sees():
    runs = packed([(3, 0, False), (2, 0, True), (4, 1, False)])
    (pack,) = runs.packs(Tiling(1024, False, part_documents=True))
    assert (pack.queries, pack.keys, pack.kind) == (slice(0, 9), slice(0, 9), TileKind.CAUSAL)
    assert pack.lengths == ((3, 3), (1, 0), (1, 1), (0, 1), (4, 4))
    assert pack.longest == (4, 4)


def test_samples_lie_end_to_end():
    (pack,) = causal(4).packs(Tiling(1024, False))
    assert pack.bounds(samples=3) == [[0, 4, 8, 12], [0, 4, 8, 12]]


def test_where_sequences_begin_is_put_on_a_device_once():
    runs = causal(4)
    (pack,) = runs.packs(Tiling(1024, False))
    bounds = runs.pack_bounds(pack, 2, torch.device("cpu"))
    assert bounds.tolist() == [[0, 4, 8], [0, 4, 8]]
    assert bounds.dtype == torch.int32
    assert runs.pack_bounds(pack, 2, torch.device("cpu")) is bounds
