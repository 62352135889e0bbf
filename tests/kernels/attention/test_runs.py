import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_runs
from megatron_ring.kernels.attention.runs import KeyRanges
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling


def runs_of(lo: list[int], hi: list[int]) -> KeyRanges:
    return KeyRanges(torch.tensor(lo, dtype=torch.int64), torch.tensor(hi, dtype=torch.int64))


def causal(length: int, strict: bool = False) -> KeyRanges:
    return runs_of([0] * length, [query + (not strict) for query in range(length)])


def window(length: int, width: int) -> KeyRanges:
    return runs_of(
        [max(0, query - width + 1) for query in range(length)],
        [query + 1 for query in range(length)],
    )


def packed(documents: list[tuple[int, int, bool]], width: int = 1000) -> KeyRanges:
    """A hop of packed documents, each of so many queries and so many more keys, its keys all behind or all ahead."""
    lo, hi, first = [], [], 0
    for queries, surplus, ahead in documents:
        last = first + max(0, queries + surplus)
        for query in range(queries):
            hi.append(min(last, first + query + (not ahead)))
            lo.append(min(hi[-1], max(first, first + query - width + 1)))
        first = last
    return runs_of(lo, hi)


def area(tiles: tuple[Tile, ...]) -> int:
    """The pairs that a kernel computes."""
    return sum(
        (tile.queries.stop - tile.queries.start) * (tile.keys.stop - tile.keys.start)
        for tile in tiles
    )


def covered(runs: KeyRanges, tiling: Tiling, keys: int) -> torch.Tensor:
    """How many tiles cover each (query, key) pair."""
    count_LM = torch.zeros(len(runs.lo), keys, dtype=torch.int64)
    for tile in runs.tiles(tiling):
        part = count_LM[tile.queries, tile.keys]
        part += {
            TileKind.FULL: torch.ones_like(part),
            TileKind.CAUSAL: torch.ones_like(part).tril(),
            TileKind.MASKED: runs.visible(tile).long(),
        }[tile.kind]
    return count_LM


def visible_by_definition(runs: KeyRanges, keys: int) -> torch.Tensor:
    pairs = [
        [lo <= key < hi for key in range(keys)]
        for lo, hi in zip(runs.lo.tolist(), runs.hi.tolist())
    ]
    return torch.tensor(pairs, dtype=torch.int64).view(len(runs.lo), keys)


def climbing(steps: list[int]) -> list[int]:
    return torch.tensor(steps, dtype=torch.int64).cumsum(0).tolist()


# steps of lo and hi along the queries; many of them 0, as in documents, or 1, as in triangles and windows
steps = st.lists(
    st.tuples(*[st.one_of(st.just(0), st.just(1), st.integers(0, 9))] * 2), max_size=40
)
stepped = steps.map(
    lambda pairs: runs_of(climbing([lo for lo, _ in pairs]), climbing([hi for _, hi in pairs]))
)
# documents as a striped ring cuts them: ranks differ by a token at most, and may hold none of a document
documents = st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 1), st.booleans()), max_size=8)
any_runs = st.one_of(
    stepped, st.builds(packed, documents, st.one_of(st.just(1000), st.integers(1, 12)))
)
tilings = st.builds(
    Tiling,
    rows=st.integers(1, 9),
    split_triangles=st.booleans(),
    part_documents=st.booleans(),
    tall=st.one_of(st.just(0), st.integers(1, 30)),
)


@given(any_runs, tilings)
@example(causal(17), Tiling(4, True))
@example(causal(17, strict=True), Tiling(4, False))
@example(window(30, 3), Tiling(4, True))
@example(window(30, 11), Tiling(4, True))
@example(
    runs_of([0, 0, 5, 5, 9], [5, 5, 9, 9, 9]), Tiling(2, False)
)  # documents, and a query that sees nothing
@example(packed([(9, 0, False), (1, 0, True), (5, 1, True), (8, -1, False)]), Tiling(4, True))
@example(packed([(1, 0, False)] * 20), Tiling(4, False))
@example(packed([(12, 0, False), (7, 1, True)], width=5), Tiling(4, True))
@example(runs_of([], []), Tiling(4, True))
def test_tiles_cover_every_visible_pair_once_and_no_other(runs, tiling):
    keys = max(runs.hi.tolist(), default=0)
    assert torch.equal(covered(runs, tiling, keys), visible_by_definition(runs, keys))


@given(any_runs, tilings)
def test_no_tile_is_blind_and_only_narrow_ones_are_masked(runs, tiling):
    for tile in runs.tiles(tiling):
        assert runs.visible(tile).any()
        assert (
            tile.kind is not TileKind.MASKED
            or tile.queries.stop - tile.queries.start <= tiling.rows
        )


@given(any_runs, tilings)
def test_causal_tiles_are_square(runs, tiling):
    for tile in runs.tiles(tiling):
        square = tile.queries.stop - tile.queries.start == tile.keys.stop - tile.keys.start
        assert square or tile.kind is not TileKind.CAUSAL


@given(any_runs)
def test_visible_pairs_are_counted(runs):
    keys = max(runs.hi.tolist(), default=0)
    assert runs.visible_pairs == visible_by_definition(runs, keys).sum()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", [128, 129, 1000, 4096])
def test_a_split_triangle_has_few_tiles_and_little_waste(length, strict):
    """At most two tiles for every 128 queries, and no more computed than tiles on the diagonal waste."""
    runs = causal(length, strict)
    tiles = runs.tiles(Tiling(128, split_triangles=True))
    assert len(tiles) <= 2 * -(-length // 128)
    assert area(tiles) - runs.visible_pairs <= length * 128


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", [1, 128, 129, 1000, 4096])
def test_a_triangle_needs_no_mask(length, strict):
    """Whole where it is not to be split; else in smaller triangles and the rectangles beside them."""
    whole, split = (causal(length, strict).tiles(Tiling(128, split)) for split in (False, True))
    assert [tile.kind for tile in whole] == [TileKind.CAUSAL] * (length > strict)
    assert TileKind.MASKED not in {tile.kind for tile in split}


@pytest.mark.parametrize(
    ("length", "queries"), [(1000, 616), (1024, 768), (1100, 844), (1535, 767 + 128), (4096, 2048)]
)
def test_a_triangle_is_cut_so_that_its_rectangle_is_tall(length, queries):
    """In the middle, or before it where three quarters of the queries are tall."""
    tiles = causal(length).tiles(Tiling(128, split_triangles=True, tall=768))
    assert (
        max(tile.queries.stop - tile.queries.start for tile in tiles if tile.kind is TileKind.FULL)
        == queries
    )


@pytest.mark.parametrize("width", [1, 100, 128, 500])
def test_a_window_has_few_tiles_and_little_waste(width):
    runs = window(4096, width)
    tiles = runs.tiles(Tiling(128, split_triangles=True))
    assert len(tiles) <= 4 * 4096 // 128
    assert area(tiles) - runs.visible_pairs <= 2 * 4096 * 128


def striped_hops(ring_size: int, lengths: list[int]) -> list[KeyRanges]:
    """What every rank of a striped ring sees of every other, where documents of these lengths are packed."""
    starts = tuple(itertools.accumulate(lengths[:-1], initial=0))
    layout = Layout("striped", sum(lengths) + -sum(lengths) % ring_size, ring_size)
    ranks = range(ring_size)
    return [
        hop_runs(layout, rank, source, Mask(document_starts=starts))
        for rank in ranks
        for source in ranks
    ]


@given(
    ring_size=st.integers(1, 4),
    tiling=tilings,
    tokens=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_documents_longer_than_a_tile_need_no_mask_in_a_striped_ring(ring_size, tiling, tokens):
    """Cut at their borders, they are triangles, and rectangles where those are split; no fewer tiles would do."""
    for runs in striped_hops(ring_size, [(tiling.rows + 1) * ring_size + more for more in tokens]):
        kinds = [tile.kind for tile in runs.tiles(tiling)]
        assert TileKind.MASKED not in kinds
        assert tiling.split_triangles or kinds == [TileKind.CAUSAL] * len(tokens)


@given(
    ring_size=st.integers(1, 4),
    rows=st.integers(1, 9),
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_short_documents_share_tiles(ring_size, rows, lengths):
    """However many documents there are, at most three tiles for every ``rows`` queries."""
    for runs in striped_hops(ring_size, lengths):
        assert len(runs.tiles(Tiling(rows, split_triangles=True))) <= 3 * -(-len(runs.lo) // rows)


@pytest.mark.parametrize("length", [1, 3, 50, 127, 200, 1000])
def test_documents_have_few_tiles_and_little_waste(length):
    """As many as fit in 4096 tokens a rank, on a ring of four."""
    for runs in striped_hops(4, [4 * length] * (4096 // length)):
        tiles = runs.tiles(Tiling(128, split_triangles=True))
        assert len(tiles) <= 3 * 4096 // 128
        assert area(tiles) - runs.visible_pairs <= 4096 * 128


def test_tiles_are_computed_once():
    runs = causal(300)
    assert runs.tiles(Tiling(128, True)) is runs.tiles(Tiling(128, True))
