r"""Tiles that cover the visible pairs of a hop: rectangles, triangles, small masked remainders.

A tile is a rectangle of queries x keys. Its kind states what a kernel must mask inside it. Together
the tiles cover each visible (query, key) pair exactly once; regions that no query sees are in no
tile. Two examples for ``Tiling(rows=2, split_triangles=True)``, queries downwards and keys to the
right:

    a causal mask            a sliding window of 5

    \ . . . . . . .          \ . . . . . . .
    \ \ . . . . . .          \ \ . . . . . .             \   CAUSAL, no mask needed
    # # \ . . . . .          # # \ . . . . .             #   FULL, no mask needed
    # # \ \ . . . .          # # \ \ . . . .             m   MASKED, visible
    # # # # \ . . .          m m # # # - . .             -   MASKED, not visible
    # # # # \ \ . .          - m # # # m . .             .   in no tile
    # # # # # # \ .          . . m m # # # -
    # # # # # # \ \          . . - m # # # m

Without ``split_triangles`` the causal mask on the left is a single CAUSAL tile. With
``sliding_windows`` the mask on the right is a single WINDOW tile.
"""

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Window(NamedTuple):
    """The keys that a query sees, relative to the diagonal of a tile; None where not limited.

    The diagonal ends at the last query and the last key, as flash-attn defines it. Of n queries and
    m keys, query i sees the keys i + m - n - left to i + m - n + right, as far as they exist.
    """

    left: int | None = None
    right: int | None = None


class TileKind(enum.Enum):
    """What is visible inside a tile."""

    FULL = "every query sees every key"
    CAUSAL = "query i sees keys 0 to i of the tile, which is square"
    WINDOW = "each query sees the keys of the tile's window"
    MASKED = "each query sees its own key range"


_WINDOWS = {TileKind.FULL: Window(), TileKind.CAUSAL: Window(right=0)}


@dataclass(frozen=True)
class Tile:
    """A rectangle of queries x keys, in local indices of the two shards.

    sliding_window: the window of a WINDOW tile, else None.
    """

    queries: slice
    keys: slice
    kind: TileKind
    sliding_window: Window | None = None

    @property
    def window(self) -> Window:
        """What is visible in a tile that is not MASKED, as a window."""
        return self.sliding_window or _WINDOWS[self.kind]


@dataclass(frozen=True)
class Tiling:
    """The tile shapes that a kernel computes efficiently.

    rows: queries of the smallest tile. Wide visible regions are still covered by a single tile.
    split_triangles: split a causal triangle into rectangles and triangles of ``rows`` queries. This
        pays where the kernel skips only coarse blocks of a triangle, as torch's CPU kernel does
        (64 to 256 queries x 512 keys).
    split_documents: split between documents however short they are, so that each has its own tiles.
        This pays where one kernel call takes many small tiles.
    tall_rows: the number of queries from which the kernel is faster. Where a split in the middle
        would leave fewer, it is moved up.
    sliding_windows: make one WINDOW tile of the queries that see a sliding window of consecutive
        tokens. This pays where the kernel has such windows.
    """

    rows: int
    split_triangles: bool
    split_documents: bool = False
    tall_rows: int = 0
    sliding_windows: bool = False


def cover(lo: torch.Tensor, hi: torch.Tensor, tiling: Tiling) -> Iterator[Tile]:
    """Yield tiles that cover the key ranges ``[lo, hi)``, each visible pair in exactly one tile."""
    return _Cover.of(lo, hi, tiling).tiles()


KeySpan = tuple[int, int]


@dataclass(frozen=True)
class _Cover:
    """Split the queries recursively; each node emits tiles for the keys that all its queries see.

    A node is a span of queries [start, stop). ``covered`` is the span of keys that its ancestors
    have emitted already. Every query of the node sees all of it, so the spans along a path from the
    root are nested, and each pair is covered once:

        node [0, 8)        all queries see key 0 only, less than a tile: split
          node [0, 4)      split in the same way
          node [4, 8)      all see keys [0, 4): emit FULL, then continue with covered = [0, 4)
            node [4, 6)    a triangle of keys beside the covered ones: emit CAUSAL
            node [6, 8)    all see [4, 6): emit FULL, then the triangle that is left: emit CAUSAL

    causal_until[i]: the first query after i that does not see exactly one key more than its
        predecessor.
    lo_constant_until[i], hi_constant_until[i]: the first query after i whose bound differs from its
        predecessor's. lo_rising_until[i], hi_rising_until[i]: the first query after i whose bound
        is not its predecessor's plus 1. All four are empty without ``sliding_windows``.
    borders: the queries that share no visible key with their predecessor. Nothing is visible across
        such a border between documents, so a node is split there instead of in its middle, and each
        document keeps its own triangle.
    """

    lo: list[int]
    hi: list[int]
    causal_until: list[int]
    lo_constant_until: list[int]
    hi_constant_until: list[int]
    lo_rising_until: list[int]
    hi_rising_until: list[int]
    borders: list[int]
    tiling: Tiling

    @staticmethod
    def of(lo: torch.Tensor, hi: torch.Tensor, tiling: Tiling) -> "_Cover":
        lo_steps, hi_steps = lo.diff(), hi.diff()

        def for_windows(continues: torch.Tensor) -> list[int]:
            return _ends_of_runs(continues) if tiling.sliding_windows else []

        return _Cover(
            lo.tolist(),
            hi.tolist(),
            causal_until=_ends_of_runs((lo_steps == 0) & (hi_steps == 1)),
            lo_constant_until=for_windows(lo_steps == 0),
            hi_constant_until=for_windows(hi_steps == 0),
            lo_rising_until=for_windows(lo_steps == 1),
            hi_rising_until=for_windows(hi_steps == 1),
            borders=(torch.nonzero(lo[1:] >= hi[:-1]).flatten() + 1).tolist(),
            tiling=tiling,
        )

    def tiles(self) -> Iterator[Tile]:
        return self._node(0, len(self.lo), None)

    def _node(self, start: int, stop: int, covered: KeySpan | None) -> Iterator[Tile]:
        start, stop = self._trim_masked_rows(start, stop, covered)
        if start == stop:
            return
        queries = slice(start, stop)
        small = self._is_small(start, stop)
        if self._is_triangle(start, stop, covered) and (small or not self.tiling.split_triangles):
            first_key = covered[1] if covered else self.lo[start]
            yield Tile(queries, slice(first_key, self.hi[stop - 1]), TileKind.CAUSAL)
            return
        if window := self._window(start, stop, covered):
            keys = slice(self.lo[start], self.hi[stop - 1])
            yield Tile(queries, keys, TileKind.WINDOW, window)
            return
        common = self._seen_by_all(start, stop, covered)
        new = list(_outside(common, covered)) if common else []
        if new and (small or self._is_wide_enough(start, stop, new)):
            for keys in new:
                yield Tile(queries, keys, TileKind.FULL)
            yield from self._node(start, stop, common)  # the rest may be a triangle
        elif small:
            seen_by_any = (self.lo[start], self.hi[stop - 1])
            for keys in _outside(seen_by_any, covered):
                yield Tile(queries, keys, TileKind.MASKED)
        else:
            split = self._split_point(start, stop)
            yield from self._node(start, split, covered)
            yield from self._node(split, stop, covered)

    def _is_small(self, start: int, stop: int) -> bool:
        """Return whether a node is not split any further."""
        if stop - start > self.tiling.rows:
            return False
        return not (self.tiling.split_documents and self._borders_near_middle(start, stop))

    @staticmethod
    def _is_wide_enough(start: int, stop: int, new: list[slice]) -> bool:
        """Return whether there are enough keys for a tile of all queries of a node.

        Each tile adds to the sums of its queries and of its keys: for the same number of pairs, the
        closer to a square, the less memory traffic. But splitting makes more tiles; the threshold
        of a quarter was measured (docs/log.md).
        """
        return 4 * sum(keys.stop - keys.start for keys in new) >= stop - start

    def _borders_near_middle(self, start: int, stop: int) -> list[int]:
        """Return the borders inside a node closest to its middle, on either side."""
        index = bisect.bisect_left(self.borders, (start + stop) // 2)
        nearest = self.borders[max(0, index - 1) : index + 1]
        return [border for border in nearest if start < border < stop]

    def _split_point(self, start: int, stop: int) -> int:
        """Split a node at the border nearest to its middle, or at a multiple of ``rows``.

        The multiple is the one at or before the middle. It is moved up where that leaves
        ``tall_rows`` queries after it, whose rectangle with the keys before them is then tall.
        """
        middle = (start + stop) // 2
        if borders := self._borders_near_middle(start, stop):
            return min(borders, key=lambda border: abs(border - middle))
        rows, tall_rows = self.tiling.rows, self.tiling.tall_rows
        before = middle - start
        if 4 * tall_rows <= 3 * (stop - start):  # otherwise the rectangle would be narrow
            before = min(before, stop - start - tall_rows)
        return start + max(before // rows, 1) * rows

    def _trim_masked_rows(self, start: int, stop: int, covered: KeySpan | None) -> tuple[int, int]:
        """Drop the queries at either end of a node that see nothing outside ``covered``."""

        def is_done(query: int) -> bool:
            lo, hi = self.lo[query], self.hi[query]
            return hi <= lo or (covered is not None and covered[0] <= lo and hi <= covered[1])

        while start < stop and is_done(start):
            start += 1
        while start < stop and is_done(stop - 1):
            stop -= 1
        return start, stop

    def _is_triangle(self, start: int, stop: int, covered: KeySpan | None) -> bool:
        """Return whether query i of the node sees just i + 1 keys after ``covered``."""
        first_visible, first_key = covered or (self.lo[start], self.lo[start])
        return (
            self.lo[start] == first_visible
            and self.hi[start] == first_key + 1
            and self.causal_until[start] >= stop
        )

    def _window(self, start: int, stop: int, covered: KeySpan | None) -> Window | None:
        """Return the sliding window through which the queries of a node see, None without one.

        The first key that a query sees is constant where a shard or document begins, and then rises
        by 1 from query to query. The last one rises by 1, and is constant where a shard ends.
        """
        if not self.tiling.sliding_windows or covered is not None:
            return None
        constant = min(self.lo_constant_until[start], stop)
        rising = min(self.hi_rising_until[start], stop)
        if constant == stop or self.lo_rising_until[constant - 1] < stop:
            return None
        if rising < stop and self.hi_constant_until[rising - 1] < stop:
            return None
        if self._borders_near_middle(start, stop):
            return None
        surplus = self.hi[stop - 1] - self.lo[start] - (stop - start)
        left = surplus + constant - start - 1
        return Window(left, stop - rising if rising > start + 1 else None)

    def _seen_by_all(self, start: int, stop: int, covered: KeySpan | None) -> KeySpan | None:
        """Return the keys that all queries of a node see, with ``covered``; None if there are none.

        Where a bound rises along the queries, the span is rounded inwards to multiples of ``rows``.
        An upper bound that rises in steps is not rounded: there any edge is as good, and what
        rounding leaves over would be one more tile.
        """
        rows = self.tiling.rows
        left, right = self.lo[stop - 1], self.hi[start]
        origin = self.lo[start]
        if left != self.lo[start]:
            left = -(-left // rows) * rows
            origin = 0
        if right != self.hi[stop - 1] and self.causal_until[start] > start + 1:
            right = origin + (right - origin) // rows * rows
        if left >= right:
            return None
        if covered is None:
            return left, right
        # A node rounds relative to its own first key, and may fall short of its ancestor's span.
        return min(left, covered[0]), max(right, covered[1])


def _ends_of_runs(continues: torch.Tensor) -> list[int]:
    """Return for each query the first one after it that does not continue its run.

    ``continues[i]`` is whether query i + 1 continues the run of query i.
    """
    queries = len(continues) + 1
    stops = torch.cat([torch.nonzero(~continues).flatten() + 1, torch.tensor([queries])])
    return stops[torch.searchsorted(stops, torch.arange(queries), right=True)].tolist()


def _outside(span: KeySpan, covered: KeySpan | None) -> Iterator[slice]:
    """Yield the parts of ``span`` before and after ``covered``."""
    if covered is None:
        yield slice(*span)
        return
    if span[0] < covered[0]:
        yield slice(span[0], covered[0])
    if covered[1] < span[1]:
        yield slice(covered[1], span[1])
