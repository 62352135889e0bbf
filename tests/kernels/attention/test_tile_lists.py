"""Lists of tiles, against a search through the mask of every tile."""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.kernels.attention import tile_lists
from megatron_ring.kernels.attention.tile_lists import TileList, tile_list

BLOCK, STEP = 8, 4
MASKS = [Mask(), Mask(window=11), Mask(document_starts=(0, 5, 41, 60, 61)), Mask(9, (0, 50, 70))]
LAYOUTS = [
    Layout("ring", 120, 3),
    Layout("striped", 120, 3),
    Layout("striped", 120, 4, 15),
    Layout("zigzag", 120, 2),
]


def ranges_of_hops():
    """Yield lo and hi of every hop, by query and by key."""
    for layout in LAYOUTS:
        for mask in MASKS:
            for rank in range(layout.ring_size):
                for source in range(layout.ring_size):
                    ranges = hop_key_ranges(layout, rank, source, mask)
                    yield ranges.lo, ranges.hi
                    yield ranges._transposed(layout.shard_length)


def visible_columns(lo, hi):
    """Return the mask of all rows and columns."""
    columns = torch.arange(121)
    return (lo[:, None] <= columns) & (columns < hi[:, None])


def rows_of(tiles: TileList) -> list[TileList]:
    return [TileList(*row) for row in torch.stack(tiles, 1).tolist()]


@pytest.mark.parametrize("steps_per_fill", [0, 1])
def test_loops_are_as_short_as_possible_and_unmasked_steps_are_completely_visible(
    steps_per_fill, monkeypatch
):
    monkeypatch.setattr(tile_lists, "STEPS_PER_FILL", steps_per_fill)
    unmasked = 0
    for lo, hi in ranges_of_hops():
        visible = visible_columns(lo, hi)
        tiles = rows_of(tile_list(lo, hi, BLOCK, STEP))
        assert len({tile.start for tile in tiles}) == len(tiles)
        seen = torch.zeros_like(visible)
        for tile in tiles:
            rows = slice(tile.start, tile.start + BLOCK)
            columns = visible[rows].any(0).nonzero().flatten()
            assert tile.first == int(columns[0]) // STEP * STEP
            assert tile.stop == int(columns[-1]) + 1
            assert tile.first <= tile.unmasked_from <= tile.unmasked_to <= tile.stop
            assert visible[rows, tile.unmasked_from : tile.unmasked_to].all()
            if tile.unmasked_from < tile.unmasked_to:
                assert tile.unmasked_from % STEP == tile.unmasked_to % STEP == 0
                assert tile.start + BLOCK <= len(lo)
                parts = (tile.unmasked_from > tile.first) + (tile.stop > tile.unmasked_to)
                assert tile.unmasked_to - tile.unmasked_from > steps_per_fill * STEP * parts
            unmasked += tile.unmasked_to - tile.unmasked_from
            seen[rows] = True
        assert not (visible & ~seen).any()
    assert unmasked > 0


def test_every_completely_visible_step_of_a_long_loop_is_unmasked(monkeypatch):
    monkeypatch.setattr(tile_lists, "STEPS_PER_FILL", 0)
    for lo, hi in ranges_of_hops():
        visible = visible_columns(lo, hi)
        for tile in rows_of(tile_list(lo, hi, BLOCK, STEP)):
            if tile.start + BLOCK > len(lo):
                continue
            complete = [
                column
                for column in range(tile.first, tile.stop - STEP + 1, STEP)
                if visible[tile.start : tile.start + BLOCK, column : column + STEP].all()
            ]
            unmasked = list(range(tile.unmasked_from, tile.unmasked_to, STEP))
            assert unmasked == complete


def test_the_longest_loops_come_first():
    for lo, hi in ranges_of_hops():
        columns = tile_list(lo, hi, BLOCK, STEP).columns
        assert (columns.diff() <= 0).all()


def test_tiles_in_which_nothing_is_visible_are_not_listed():
    lo = torch.tensor([0] * 8 + [5] * 8 + [5] * 8)
    hi = torch.tensor([3] * 8 + [5] * 8 + [9] * 8)
    assert sorted(tile_list(lo, hi, BLOCK, STEP).start.tolist()) == [0, 16]
