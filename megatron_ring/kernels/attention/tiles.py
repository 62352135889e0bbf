"""Tiles that cover the runs of a hop: rectangles without a mask, triangles, and small remainders.

The visible region is cut into rectangles that need no mask (FULL), triangles aligned at their top left (CAUSAL) and
small remainders that a kernel must mask by the runs (MASKED); what nobody sees lies in no tile.
"""

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch


class TileKind(enum.Enum):
    FULL = "every query sees every key"
    CAUSAL = "query i sees the keys up to i; the tile is square"
    MASKED = "each query sees its own run"


@dataclass(frozen=True)
class Tile:
    """A rectangle of queries x keys, in local indices of the two shards."""

    queries: slice
    keys: slice
    kind: TileKind


@dataclass(frozen=True)
class Tiling:
    """How a kernel likes its tiles.

    rows: queries of the smallest tile. Wide visible regions are still handed over whole.
    split_triangles: cut a causal triangle into rectangles and triangles of ``rows`` queries. It pays where the kernel
        skips only coarse blocks of a triangle, as torch's CPU kernel does (64 to 256 queries x 512 keys).
    part_documents: cut between documents however short, so that each has tiles of its own. It pays where many small
        tiles go to the kernel in one call.
    tall: queries from which the kernel is faster, to be had where a cut in the middle would leave fewer.
    """

    rows: int
    split_triangles: bool
    part_documents: bool = False
    tall: int = 0


def cover(lo: torch.Tensor, hi: torch.Tensor, tiling: Tiling) -> Iterator[Tile]:
    """The tiles of the runs ``[lo, hi)``, each visible pair in exactly one of them."""
    return _Cover.of(lo, hi, tiling).tiles()


@dataclass(frozen=True)
class _Cover:
    """Halve the queries again and again; at each node hand over the keys that all its queries see.

    ``done`` is the span of keys that an ancestor has handed over already: every query of a node sees it, so the spans
    of a path from the root are nested and each pair is covered once.

    causal_until[i]: the first query behind i that does not see exactly one key more than the one before it.
    borders: the queries that see no key which the one before them sees. Between documents there is nothing to cover,
    so a node is cut there rather than in its middle, and each document has its own triangle.
    """

    lo: list[int]
    hi: list[int]
    causal_until: list[int]
    borders: list[int]
    tiling: Tiling

    @staticmethod
    def of(lo: torch.Tensor, hi: torch.Tensor, tiling: Tiling) -> "_Cover":
        stops = torch.cat(
            [
                torch.nonzero((lo.diff() != 0) | (hi.diff() != 1)).flatten() + 1,
                torch.tensor([len(lo)]),
            ]
        )
        causal_until = stops[torch.searchsorted(stops, torch.arange(len(lo)), right=True)]
        borders = torch.nonzero(lo[1:] >= hi[:-1]).flatten() + 1
        return _Cover(lo.tolist(), hi.tolist(), causal_until.tolist(), borders.tolist(), tiling)

    def tiles(self) -> Iterator[Tile]:
        return self._node(0, len(self.lo), None)

    def _node(self, start: int, stop: int, done: tuple[int, int] | None) -> Iterator[Tile]:
        start, stop = self._trim_masked_rows(start, stop, done)
        if start == stop:
            return
        small = self._is_small(start, stop)
        if self._is_triangle(start, stop, done) and (small or not self.tiling.split_triangles):
            key = done[1] if done else self.lo[start]
            yield Tile(slice(start, stop), slice(key, self.hi[stop - 1]), TileKind.CAUSAL)
            return
        seen_by_all = self._seen_by_all(start, stop, done)
        new = list(_outside(seen_by_all, done)) if seen_by_all else []
        if new and (small or self._is_wide_enough(start, stop, new)):
            yield from (Tile(slice(start, stop), keys, TileKind.FULL) for keys in new)
            yield from self._node(start, stop, seen_by_all)  # what is left may be a triangle
        elif small:
            seen_by_any = (self.lo[start], self.hi[stop - 1])
            yield from (
                Tile(slice(start, stop), keys, TileKind.MASKED)
                for keys in _outside(seen_by_any, done)
            )
        else:
            middle = self._middle(start, stop)
            yield from self._node(start, middle, done)
            yield from self._node(middle, stop, done)

    def _is_small(self, start: int, stop: int) -> bool:
        return stop - start <= self.tiling.rows and not (
            self.tiling.part_documents and self._near(start, stop)
        )

    @staticmethod
    def _is_wide_enough(start: int, stop: int, new: list[slice]) -> bool:
        """Whether there are keys enough for a tile of all of a node's queries.

        Each tile adds to the sums of its queries and of its keys: for as many pairs, the closer to a square the less.
        But halves are tiles more; where they begin to pay is measured in docs/log.md.
        """
        return 4 * sum(keys.stop - keys.start for keys in new) >= stop - start

    def _near(self, start: int, stop: int) -> list[int]:
        """The borders within a node next to its middle."""
        at = bisect.bisect_left(self.borders, (start + stop) // 2)
        return [border for border in self.borders[max(0, at - 1) : at + 1] if start < border < stop]

    def _middle(self, start: int, stop: int) -> int:
        """Where to cut: the border nearest to the middle, else the middle in whole tiles from the start.

        Or before it, where that makes the later queries ``tall``, of which a rectangle with the keys before them comes.
        """
        half, rows = (start + stop) // 2, self.tiling.rows
        if near := self._near(start, stop):
            return min(near, key=lambda border: abs(border - half))
        early = half - start
        if 4 * self.tiling.tall <= 3 * (stop - start):  # else the rectangle would be narrow
            early = min(early, stop - start - self.tiling.tall)
        return start + max(early // rows, 1) * rows

    def _trim_masked_rows(
        self, start: int, stop: int, done: tuple[int, int] | None
    ) -> tuple[int, int]:
        """The queries left when those at either end that see nothing outside ``done`` are dropped."""

        def blind(query: int) -> bool:
            lo, hi = self.lo[query], self.hi[query]
            return hi <= lo or (done is not None and done[0] <= lo and hi <= done[1])

        while start < stop and blind(start):
            start += 1
        while start < stop and blind(stop - 1):
            stop -= 1
        return start, stop

    def _is_triangle(self, start: int, stop: int, done: tuple[int, int] | None) -> bool:
        """Whether, outside ``done``, query i of the node sees exactly i + 1 keys, all from one first key."""
        left, first = done or (self.lo[start], self.lo[start])
        return (
            self.lo[start] == left
            and self.hi[start] == first + 1
            and self.causal_until[start] >= stop
        )

    def _seen_by_all(
        self, start: int, stop: int, done: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """The keys that every query of the node sees, with ``done``; rounded inwards to whole tiles where runs climb.

        Not where they climb by stairs, at which an edge is as good as any: what rounding leaves would be a tile more.
        """
        rows = self.tiling.rows
        left, right, origin = self.lo[stop - 1], self.hi[start], self.lo[start]
        if left != self.lo[start]:
            left, origin = -(-left // rows) * rows, 0
        if right != self.hi[stop - 1] and self.causal_until[start] > start + 1:
            right = origin + (right - origin) // rows * rows
        if left >= right:
            return None
        # A node rounds from where its own runs begin, and may so fall short of its ancestor.
        return (min(left, done[0]), max(right, done[1])) if done else (left, right)


def _outside(span: tuple[int, int], done: tuple[int, int] | None) -> Iterator[slice]:
    """The parts of ``span`` before and behind ``done``."""
    if done is None:
        yield slice(*span)
        return
    if span[0] < done[0]:
        yield slice(span[0], done[0])
    if done[1] < span[1]:
        yield slice(done[1], span[1])
