"""Tiles cover every visible pair once, with few tiles and little computed in vain."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.kernels.attention import tiles as tiles_module
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling, Window


def key_ranges_of(lo: list[int], hi: list[int]) -> KeyRanges:
    return KeyRanges(torch.tensor(lo, dtype=torch.int64), torch.tensor(hi, dtype=torch.int64))


def causal(length: int, strict: bool = False) -> KeyRanges:
    return key_ranges_of([0] * length, [query + (not strict) for query in range(length)])


def window(length: int, width: int) -> KeyRanges:
    lo = [max(0, query - width + 1) for query in range(length)]
    hi = [query + 1 for query in range(length)]
    return key_ranges_of(lo, hi)


def packed(documents: list[tuple[int, int, bool]], width: int = 1000) -> KeyRanges:
    """Return the key ranges of a hop with packed documents and a window.

    documents: for each the number of queries, how many more keys it has, and whether its keys are
        one token after the queries (so that query i sees i keys of it) instead of at or before them
        (i + 1).
    """
    lo, hi = [], []
    first = 0
    for queries, surplus, after in documents:
        last = first + max(0, queries + surplus)
        for query in range(queries):
            hi.append(min(last, first + query + (not after)))
            lo.append(min(hi[-1], max(first, first + query - width + 1)))
        first = last
    return key_ranges_of(lo, hi)


def length(span: slice) -> int:
    return span.stop - span.start


def area(tiles: tuple[Tile, ...]) -> int:
    """Count the pairs that a kernel computes, masked ones included."""
    return sum(length(tile.queries) * length(tile.keys) for tile in tiles)


def covered(key_ranges: KeyRanges, tiling: Tiling, keys: int) -> torch.Tensor:
    """Count the tiles that cover each (query, key) pair."""
    count_LM = torch.zeros(len(key_ranges.lo), keys, dtype=torch.int64)
    for tile in key_ranges.tiles(tiling):
        part = count_LM[tile.queries, tile.keys]
        part += {
            TileKind.FULL: torch.ones_like(part),
            TileKind.CAUSAL: torch.ones_like(part).tril(),
            TileKind.WINDOW: in_window(tile.sliding_window or Window(), *part.shape),
            TileKind.MASKED: key_ranges.visible(tile).long(),
        }[tile.kind]
    return count_LM


def in_window(window: Window, queries: int, keys: int) -> torch.Tensor:
    """Return which pairs a window leaves visible, 1 or 0, by its definition."""
    left, right = window
    distance_LM = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    inside_LM = torch.ones(queries, keys, dtype=torch.bool)
    if left is not None:
        inside_LM &= distance_LM >= -left
    if right is not None:
        inside_LM &= distance_LM <= right
    return inside_LM.long()


def visible_by_definition(key_ranges: KeyRanges, keys: int) -> torch.Tensor:
    pairs = [
        [lo <= key < hi for key in range(keys)]
        for lo, hi in zip(key_ranges.lo.tolist(), key_ranges.hi.tolist())
    ]
    return torch.tensor(pairs, dtype=torch.int64).view(len(key_ranges.lo), keys)


def cumulative(steps: list[int]) -> list[int]:
    return torch.tensor(steps, dtype=torch.int64).cumsum(0).tolist()


# Steps of lo and hi along the queries; many of them 0, as in documents, or 1, as in triangles and
# windows.
steps = st.lists(
    st.tuples(*[st.one_of(st.just(0), st.just(1), st.integers(0, 9))] * 2), max_size=40
)
stepped = steps.map(
    lambda pairs: key_ranges_of(
        cumulative([lo for lo, _ in pairs]), cumulative([hi for _, hi in pairs])
    )
)
# Documents as a striped ring splits them: the ranks' shares differ by one token at most and may be
# empty.
documents = st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 1), st.booleans()), max_size=8)
any_key_ranges = st.one_of(
    stepped, st.builds(packed, documents, st.one_of(st.just(1000), st.integers(1, 12)))
)
tilings = st.builds(
    Tiling,
    rows=st.integers(1, 9),
    split_triangles=st.booleans(),
    split_documents=st.booleans(),
    tall_rows=st.one_of(st.just(0), st.integers(1, 30)),
    sliding_windows=st.booleans(),
)


@given(any_key_ranges, tilings)
@example(causal(17), Tiling(4, True))
@example(causal(17, strict=True), Tiling(4, False))
@example(window(30, 3), Tiling(4, True))
@example(window(30, 11), Tiling(4, True))
# Documents, and a query that sees nothing.
@example(key_ranges_of([0, 0, 5, 5, 9], [5, 5, 9, 9, 9]), Tiling(2, False))
@example(packed([(9, 0, False), (1, 0, True), (5, 1, True), (8, -1, False)]), Tiling(4, True))
@example(packed([(1, 0, False)] * 20), Tiling(4, False))
@example(packed([(12, 0, False), (7, 1, True)], width=5), Tiling(4, True))
@example(key_ranges_of([], []), Tiling(4, True))
def test_tiles_cover_every_visible_pair_once_and_no_other(key_ranges, tiling):
    keys = max(key_ranges.hi.tolist(), default=0)
    expected = visible_by_definition(key_ranges, keys)
    assert torch.equal(covered(key_ranges, tiling, keys), expected)


@given(any_key_ranges, tilings)
def test_every_tile_has_a_visible_pair_and_masked_tiles_are_small(key_ranges, tiling):
    for tile in key_ranges.tiles(tiling):
        assert key_ranges.visible(tile).any()
        assert tile.kind is not TileKind.MASKED or length(tile.queries) <= tiling.rows


@given(any_key_ranges, tilings)
def test_causal_tiles_are_square(key_ranges, tiling):
    for tile in key_ranges.tiles(tiling):
        assert tile.kind is not TileKind.CAUSAL or length(tile.queries) == length(tile.keys)


@given(any_key_ranges)
def test_visible_pairs_are_counted(key_ranges):
    keys = max(key_ranges.hi.tolist(), default=0)
    assert key_ranges.visible_pairs == visible_by_definition(key_ranges, keys).sum()


def drawn(key_ranges: KeyRanges, tiling: Tiling) -> list[str]:
    """Draw the rows of the picture in the docstring of tiles.py."""
    picture = [["."] * len(key_ranges.lo) for _ in key_ranges.lo]
    for tile in key_ranges.tiles(tiling):
        visible = key_ranges.visible(tile).tolist()
        for query, row in enumerate(visible, tile.queries.start):
            for key, seen in enumerate(row, tile.keys.start):
                if tile.kind is TileKind.MASKED:
                    picture[query][key] = "m" if seen else "-"
                elif seen:
                    picture[query][key] = "#" if tile.kind is TileKind.FULL else "\\"
    return [" ".join(row) for row in picture]


def test_the_examples_in_the_documentation_are_what_is_computed():
    tiling = Tiling(rows=2, split_triangles=True)
    rows = zip(drawn(causal(8), tiling), drawn(window(8, 5), tiling))
    for left, right in rows:
        assert f"    {left}          {right}" in tiles_module.__doc__


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tokens", [128, 129, 1000, 4096])
def test_a_split_triangle_has_few_tiles_and_little_waste(tokens, strict):
    """There are at most two tiles for every 128 queries; only those on the diagonal waste work."""
    key_ranges = causal(tokens, strict)
    tiles = key_ranges.tiles(Tiling(128, split_triangles=True))
    assert len(tiles) <= 2 * -(-tokens // 128)
    assert area(tiles) - key_ranges.visible_pairs <= tokens * 128


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tokens", [1, 128, 129, 1000, 4096])
def test_a_triangle_needs_no_mask(tokens, strict):
    """It is one tile, or when split smaller triangles and the rectangles beside them."""
    whole, split = (causal(tokens, strict).tiles(Tiling(128, split)) for split in (False, True))
    assert [tile.kind for tile in whole] == [TileKind.CAUSAL] * (tokens > strict)
    assert TileKind.MASKED not in {tile.kind for tile in split}


@pytest.mark.parametrize(
    ("tokens", "queries"), [(1000, 616), (1024, 768), (1100, 844), (1535, 767 + 128), (4096, 2048)]
)
def test_a_triangle_is_split_so_that_its_rectangle_is_tall(tokens, queries):
    """In the middle, or before it where ``tall_rows`` are at most three quarters of the queries."""
    tiles = causal(tokens).tiles(Tiling(128, split_triangles=True, tall_rows=768))
    assert max(length(tile.queries) for tile in tiles if tile.kind is TileKind.FULL) == queries


@pytest.mark.parametrize("width", [1, 100, 128, 500])
def test_a_window_has_few_tiles_and_little_waste(width):
    key_ranges = window(4096, width)
    tiles = key_ranges.tiles(Tiling(128, split_triangles=True))
    assert len(tiles) <= 4 * 4096 // 128
    assert area(tiles) - key_ranges.visible_pairs <= 2 * 4096 * 128


def striped_hops(ring_size: int, lengths: list[int]) -> list[KeyRanges]:
    """Return the key ranges of all hops of a striped ring over documents of these lengths."""
    starts = tuple(itertools.accumulate(lengths[:-1], initial=0))
    layout = Layout("striped", sum(lengths) + -sum(lengths) % ring_size, ring_size)
    mask = Mask(document_starts=starts)
    pairs_of_ranks = itertools.product(range(ring_size), repeat=2)
    return [hop_key_ranges(layout, rank, source, mask) for rank, source in pairs_of_ranks]


@given(
    ring_size=st.integers(1, 4),
    tiling=tilings,
    tokens=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_documents_longer_than_a_tile_need_no_mask_in_a_striped_ring(ring_size, tiling, tokens):
    """Split at their borders, they are one triangle each, or split triangles with rectangles."""
    for key_ranges in striped_hops(
        ring_size, [(tiling.rows + 1) * ring_size + more for more in tokens]
    ):
        kinds = [tile.kind for tile in key_ranges.tiles(tiling)]
        assert TileKind.MASKED not in kinds
        assert tiling.split_triangles or kinds == [TileKind.CAUSAL] * len(tokens)


@given(
    ring_size=st.integers(1, 4),
    rows=st.integers(1, 9),
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_short_documents_share_tiles(ring_size, rows, lengths):
    """There are at most three tiles for every ``rows`` queries, for any number of documents."""
    for key_ranges in striped_hops(ring_size, lengths):
        tiles = key_ranges.tiles(Tiling(rows, split_triangles=True))
        assert len(tiles) <= 3 * -(-len(key_ranges.lo) // rows)


@pytest.mark.parametrize("tokens", [1, 3, 50, 127, 200, 1000])
def test_documents_have_few_tiles_and_little_waste(tokens):
    """As many documents as fit in 4096 tokens per rank, on a ring of four."""
    for key_ranges in striped_hops(4, [4 * tokens] * (4096 // tokens)):
        tiles = key_ranges.tiles(Tiling(128, split_triangles=True))
        assert len(tiles) <= 3 * 4096 // 128
        assert area(tiles) - key_ranges.visible_pairs <= 4096 * 128


def test_tiles_are_computed_once():
    key_ranges = causal(300)
    assert key_ranges.tiles(Tiling(128, True)) is key_ranges.tiles(Tiling(128, True))
