"""The mask language: query i sees the keys of one run ``[lo[i], hi[i])``; and the tiles that cover such runs.

One pair of integers per query says causal, sliding window and packed documents, under every layout and stripe size.
Both bounds are non-decreasing along the queries. ``tiles`` cuts the visible region into rectangles that need no mask
(FULL), triangles aligned at their top left (CAUSAL) and small remainders that a kernel must mask by the runs (MASKED);
what nobody sees lies in no tile. Nothing here knows where tokens live or who computes.
"""

import bisect
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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
    """

    rows: int
    split_triangles: bool


@dataclass(frozen=True, eq=False)
class KeyRuns:
    """The runs of keys that a shard of queries sees in another shard: ``lo``, ``hi``, (L,) int64, non-decreasing."""

    lo: torch.Tensor
    hi: torch.Tensor
    _tiles: dict[Tiling, tuple[Tile, ...]] = field(default_factory=dict, init=False, repr=False)
    _on_device: dict[tuple, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible: the work of the hop."""
        return int((self.hi - self.lo).clamp(min=0).sum())

    def tiles(self, tiling: Tiling) -> tuple[Tile, ...]:
        """The tiles that cover the runs, each visible pair exactly once; computed once per tiling and kept."""
        if tiling not in self._tiles:
            self._tiles[tiling] = tuple(_Cover.of(self, tiling).tiles())
        return self._tiles[tiling]

    def bounds(self, device: torch.device) -> torch.Tensor:
        """lo and hi, (2, L) int32, on ``device``; put there once, on the current stream, and kept."""
        return self._kept(("bounds", device), lambda: torch.stack([self.lo, self.hi]))

    def readers(self, block: int, keys: int, device: torch.device) -> torch.Tensor:
        """(4, blocks of keys) int32, on ``device``: which queries see a block, put there once and kept.

        Queries [0, 3) see any key of the block, those in [1, 2) all of them; both may be empty.
        """

        def found() -> torch.Tensor:
            start = torch.arange(0, keys, block)
            stop = (start + block).clamp(max=keys)
            return torch.stack([
                torch.searchsorted(self.hi, start, right=True),
                torch.searchsorted(self.hi, stop),
                torch.searchsorted(self.lo, start, right=True),
                torch.searchsorted(self.lo, stop),
            ])  # fmt: skip

        return self._kept(("readers", block, keys, device), found)

    def _kept(self, name: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._on_device:
            self._on_device[name] = _put(compute().to(torch.int32), name[-1])
        return self._on_device[name]

    def visible(self, tile: Tile) -> torch.Tensor:
        """Which keys of ``tile`` each of its queries sees: (queries, keys) bool."""
        keys = torch.arange(tile.keys.start, tile.keys.stop)
        lo, hi = self.lo[tile.queries, None], self.hi[tile.queries, None]
        return (lo <= keys) & (keys < hi)


def _put(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``, by a copy that queues on the current stream and that the host does not wait for.

    Out of pageable memory, or where nobody says otherwise, it would wait until all that was queued before is done too:
    in the midst of a ring, with the next exchange yet to be posted. Torch reuses pinned memory behind the copy.
    """
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Cover:
    """Halve the queries again and again; at each node hand over the keys that all its queries see.

    ``done`` is the span of keys that an ancestor has handed over already: every query of a node sees it, so the spans
    of a path from the root are nested and each pair is covered once.

    climbs_until[i]: the first query behind i that does not see exactly one key more than the one before it.
    borders: the queries that see no key which the one before them sees. Between documents there is nothing to cover,
    so a node is cut there rather than in its middle, and each document has its own triangle.
    """

    lo: list[int]
    hi: list[int]
    climbs_until: list[int]
    borders: list[int]
    tiling: Tiling

    @staticmethod
    def of(runs: KeyRuns, tiling: Tiling) -> "_Cover":
        lo, hi = runs.lo, runs.hi
        stops = torch.cat([torch.nonzero((lo.diff() != 0) | (hi.diff() != 1)).flatten() + 1, torch.tensor([len(lo)])])
        climbs_until = stops[torch.searchsorted(stops, torch.arange(len(lo)), right=True)]
        borders = torch.nonzero(lo[1:] >= hi[:-1]).flatten() + 1
        return _Cover(lo.tolist(), hi.tolist(), climbs_until.tolist(), borders.tolist(), tiling)

    def tiles(self) -> Iterator[Tile]:
        return self._node(0, len(self.lo), None)

    def _node(self, start: int, stop: int, done: tuple[int, int] | None) -> Iterator[Tile]:
        start, stop = self._without_blind(start, stop, done)
        if start == stop:
            return
        small = stop - start <= self.tiling.rows
        if self._is_triangle(start, stop, done) and (small or not self.tiling.split_triangles):
            key = done[1] if done else self.lo[start]
            yield Tile(slice(start, stop), slice(key, self.hi[stop - 1]), TileKind.CAUSAL)
            return
        seen_by_all = self._seen_by_all(start, stop, done)
        if seen_by_all and (done is None or seen_by_all != done):
            yield from (Tile(slice(start, stop), keys, TileKind.FULL) for keys in _outside(seen_by_all, done))
            yield from self._node(start, stop, seen_by_all)  # what is left may be a triangle
        elif small:
            seen_by_any = (self.lo[start], self.hi[stop - 1])
            yield from (Tile(slice(start, stop), keys, TileKind.MASKED) for keys in _outside(seen_by_any, done))
        else:
            middle = self._middle(start, stop)
            yield from self._node(start, middle, done)
            yield from self._node(middle, stop, done)

    def _middle(self, start: int, stop: int) -> int:
        """Where to cut: the border nearest to the middle, else the middle in whole tiles from the start."""
        half = (start + stop) // 2
        at = bisect.bisect_left(self.borders, half)
        near = [border for border in self.borders[max(0, at - 1) : at + 1] if start < border < stop]
        if near:
            return min(near, key=lambda border: abs(border - half))
        return start + -(-(stop - start) // (2 * self.tiling.rows)) * self.tiling.rows

    def _without_blind(self, start: int, stop: int, done: tuple[int, int] | None) -> tuple[int, int]:
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
        return self.lo[start] == left and self.hi[start] == first + 1 and self.climbs_until[start] >= stop

    def _seen_by_all(self, start: int, stop: int, done: tuple[int, int] | None) -> tuple[int, int] | None:
        """The keys that every query of the node sees, with ``done``; rounded inwards to whole tiles where runs move."""
        rows = self.tiling.rows
        left, right, origin = self.lo[stop - 1], self.hi[start], self.lo[start]
        if left != self.lo[start]:
            left, origin = -(-left // rows) * rows, 0
        if right != self.hi[stop - 1]:
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
