"""Key ranges from positions: every layout sees exactly the keys that the dense mask allows."""

import itertools
import weakref

import pytest
import torch

from megatron_ring.context_parallel import mask as mask_module
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import (
    Mask,
    compute_key_ranges,
    hop_key_ranges,
    mask_of_documents,
    mask_of_window,
)
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling
from megatron_ring.parallel.collectives import ProcessGroups
from tests import oracle

LAYOUTS = [
    Layout("none", 7, 1),
    *(Layout("ring", 4 * length, 4) for length in (1, 2, 7)),
    *(Layout("striped", 4 * length, 4) for length in (1, 2, 7)),
    *(Layout("striped", 3 * stripe * 5, 3, stripe) for stripe in (2, 3, 16)),
    *(Layout("zigzag", 4 * length, 4) for length in (2, 6)),
]

LAYOUT = Layout("striped", 16, 4)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def dense_mask(key_ranges: KeyRanges, keys: int) -> torch.Tensor:
    """Return ``key_ranges`` as a dense (queries, keys) mask."""
    tile = Tile(slice(0, len(key_ranges.lo)), slice(0, keys), TileKind.MASKED)
    return key_ranges.visible(tile)


def mask_of_all_shards(layout: Layout, first_visible: torch.Tensor) -> torch.Tensor:
    """Return the (S, S) mask, assembled from the key ranges of every pair of ranks."""
    visible_SS = torch.zeros(layout.seq_length, layout.seq_length, dtype=torch.bool)
    shards = [layout.positions(ring_rank) for ring_rank in range(layout.ring_size)]
    for queries in shards:
        for keys in shards:
            key_ranges = compute_key_ranges(queries, keys, first_visible[queries])
            visible_SS[queries[:, None], keys] = dense_mask(key_ranges, len(keys))
    return visible_SS


@each_layout
def test_causal_key_ranges_give_the_causal_mask(layout):
    visible_SS = torch.zeros(layout.seq_length, layout.seq_length, dtype=torch.bool)
    for rank, source in itertools.product(range(layout.ring_size), repeat=2):
        at = layout.positions(rank)[:, None], layout.positions(source)
        visible_SS[at] = dense_mask(hop_key_ranges(layout, rank, source), layout.shard_length)
    assert torch.equal(visible_SS, torch.ones_like(visible_SS).tril())


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
@each_layout
def test_a_sliding_window_gives_a_band(layout, window):
    p = torch.arange(layout.seq_length)
    band_SS = (p[:, None] >= p) & (p[:, None] - p < window)
    assert torch.equal(mask_of_all_shards(layout, p - window + 1), band_SS)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 3, 5), (13, 1), (1000,)], ids=str)
@each_layout
def test_tokens_see_only_their_own_document(layout, lengths):
    """Documents of these lengths repeat; the last one is cut at the end of the sample."""
    numbered = zip(range(layout.seq_length), itertools.cycle(lengths))
    document_S = torch.tensor(
        [number for number, length in numbered for _ in range(length)][: layout.seq_length]
    )
    start_S = torch.searchsorted(document_S, document_S)
    blocks_SS = (document_S[:, None] == document_S).tril()
    assert torch.equal(mask_of_all_shards(layout, start_S), blocks_SS)


MASKS = {
    "a window": (4, None),
    "documents": (0, (3, 1, 1, 9)),
    "a window in documents": (4, (3, 1, 1, 9)),
    "single tokens": (0, (1,)),
    "whole samples": (0, (1000,)),
}


def mask_of(document_BS: torch.Tensor, window: int) -> Mask:
    return Mask(window, tuple(oracle.document_starts(document_BS).tolist()), len(document_BS))


def mask_of_all_shards_and_samples(layout: Layout, mask: Mask) -> torch.Tensor:
    """Return which keys of which sample each query of each sample sees, (B, S, B, S)."""
    shape = mask.samples, layout.seq_length
    shard_shape = mask.samples, layout.shard_length
    visible_BSBS = torch.zeros(*shape, *shape, dtype=torch.bool)
    for rank, source in itertools.product(range(layout.ring_size), repeat=2):
        key_ranges = hop_key_ranges(layout, rank, source, mask)
        visible = dense_mask(key_ranges, mask.samples * layout.shard_length)
        visible_BLBL = visible.view(*shard_shape, *shard_shape)
        queries = layout.positions(rank)
        keys = layout.positions(source)
        visible_BSBS[:, queries[:, None], :, keys] = visible_BLBL.permute(1, 3, 0, 2)
    return visible_BSBS


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", MASKS)
@each_layout
def test_concatenated_samples_see_only_themselves(layout, name, samples):
    """Each sample is masked as by the oracle, and no query sees a key of another sample."""
    window, lengths = MASKS[name]
    document_BS = oracle.documents(samples, layout.seq_length, lengths or (layout.seq_length,))
    visible_BSBS = mask_of_all_shards_and_samples(layout, mask_of(document_BS, window))
    expected_BSBS = torch.zeros_like(visible_BSBS)
    for sample, visible_SS in enumerate(oracle.visible(document_BS, window)):
        expected_BSBS[sample, :, sample] = visible_SS
    assert torch.equal(visible_BSBS, expected_BSBS)


WHOLE = Tiling(rows=8, split_triangles=False)
ALL, BUT_FIRST, BUT_LAST = slice(0, 8), slice(1, 8), slice(0, 7)
FIRST_HALF, SECOND_HALF = slice(0, 4), slice(4, 8)

# Tiles that cover what a rank sees of its own keys, of an earlier rank's and of a later rank's.
RECTANGLES = {
    "ring": (
        [(ALL, ALL, TileKind.CAUSAL)],
        [(ALL, ALL, TileKind.FULL)],
        [],
    ),
    "striped": (
        [(ALL, ALL, TileKind.CAUSAL)],
        [(ALL, ALL, TileKind.CAUSAL)],
        [(BUT_FIRST, BUT_LAST, TileKind.CAUSAL)],
    ),
    "zigzag": (
        [(ALL, ALL, TileKind.CAUSAL)],
        [(ALL, FIRST_HALF, TileKind.FULL)],
        [(SECOND_HALF, ALL, TileKind.FULL)],
    ),
}


@pytest.mark.parametrize("name", RECTANGLES)
def test_every_hop_is_at_most_one_rectangle(name):
    """A vendor kernel needs only one call per hop."""
    layout = Layout(name, 4 * 8, 4)
    own, earlier, later = ([Tile(*tile) for tile in tiles] for tiles in RECTANGLES[name])
    for rank, source in itertools.product(range(4), repeat=2):
        of_others = earlier if source < rank else later
        expected = own if source == rank else of_others
        assert list(hop_key_ranges(layout, rank, source).tiles(WHOLE)) == expected


def test_stripes_of_one_tile_need_masked_tiles_only_for_own_keys():
    layout = Layout("striped", 4 * 32, 4, stripe_size=8)
    tiling = Tiling(8, split_triangles=True)
    for rank, source in itertools.product(range(4), repeat=2):
        kinds = {tile.kind for tile in hop_key_ranges(layout, rank, source).tiles(tiling)}
        assert (kinds == {TileKind.FULL}) == (rank != source)


def test_key_ranges_are_computed_once_for_every_layer_of_a_batch():
    starts = torch.tensor([0, 5, 9])
    first, second = (
        hop_key_ranges(LAYOUT, 2, 1, mask_of_documents(starts, 4, 1, LAYOUT)) for _ in range(2)
    )
    assert first is second
    other_window = hop_key_ranges(LAYOUT, 2, 1, mask_of_documents(starts, 0, 1, LAYOUT))
    assert other_window is not first
    assert hop_key_ranges(LAYOUT, 2, 1, mask_of_documents(starts, 4, 1, LAYOUT)) is first
    assert hop_key_ranges(LAYOUT, 2, 1, mask_of_window(4)) is hop_key_ranges(
        LAYOUT, 2, 1, mask_of_window(4)
    )


def test_a_buffer_refilled_with_other_documents_gets_another_mask():
    starts = torch.tensor([0, 5, 9])
    before = mask_of_documents(starts, 0, 1, LAYOUT)
    starts.numpy()[:] = [0, 2, 11]  # like a receive, without a new version in torch
    assert mask_of_documents(starts, 0, 1, LAYOUT).document_starts == (0, 2, 11)
    assert before.document_starts == (0, 5, 9)


def test_key_ranges_are_freed_with_their_batch():
    freed = []
    for batch in range(3):
        starts = torch.tensor([0, 5 + batch])
        key_ranges = hop_key_ranges(LAYOUT, 2, 1, mask_of_documents(starts, 0, 1, LAYOUT))
        weakref.finalize(key_ranges, freed.append, batch)
        del key_ranges
    assert freed == [0, 1]


def test_a_mask_without_documents_caches_a_bounded_number_of_key_ranges():
    mask = Mask()
    for length in range(1, 1100):
        hop_key_ranges(Layout("none", length, 1), 0, 0, mask)
    assert len(mask.cached_key_ranges) == 1024


def test_all_layers_of_a_batch_share_one_mask_forward_and_backward(monkeypatch):
    created = []
    monkeypatch.setattr(mask_module, "Mask", lambda *args: created.append(args) or Mask(*args))
    attention = ContextParallelAttention(Layout("none", 12, 1), "reference", ProcessGroups())
    starts = torch.tensor([0, 5])
    out = torch.randn(1, 12, 2, 8, requires_grad=True)
    for _ in range(3):
        out, _ = attention(out, out, out, 0, starts)
    out.sum().backward()
    assert created == [(0, (0, 5), 1, ())]
