"""Tiles as the sequences of one packed ("varlen") call, as flash-attn takes them.

Tiles of one kind that meet neither in queries nor in keys lie along the two shards like the documents of a pack, each
with queries and keys of its own; striped documents are one such call a hop. Queries between two tiles are a sequence
without keys, keys between them one without queries, so that the cumulative lengths run through and nothing is copied.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ring.kernels.attention.tiles import Tile, TileKind


@dataclass(frozen=True, eq=False)
class Pack:
    """Sequences of queries x keys, from the top left to the bottom right of the rectangle ``queries`` x ``keys``.

    lengths: the numbers of queries and keys of each sequence, in order; either may be 0.
    """

    queries: slice
    keys: slice
    kind: TileKind
    lengths: tuple[tuple[int, int], ...]

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a sequence, those that see or are seen by nobody included."""
        return tuple(max(lengths) for lengths in zip(*self.lengths))

    def bounds(self, samples: int) -> list[list[int]]:
        """Where each sequence of queries, and of keys, begins and ends in ``samples`` such rectangles end to end."""
        return [
            list(itertools.accumulate(lengths * samples, initial=0))
            for lengths in zip(*self.lengths)
        ]


def packed(tiles: Iterable[Tile]) -> Iterator[Pack]:
    """The FULL and CAUSAL tiles in packs, each tile in the first that it can follow."""
    rows: list[list[Tile]] = []
    for tile in tiles:
        if tile.kind is TileKind.MASKED:
            continue
        if row := next((row for row in rows if _follows(tile, row[-1])), None):
            row.append(tile)
        else:
            rows.append([tile])
    return map(_pack, rows)


def _follows(tile: Tile, last: Tile) -> bool:
    behind = tile.queries.start >= last.queries.stop and tile.keys.start >= last.keys.stop
    return behind and tile.kind is last.kind


def _pack(row: list[Tile]) -> Pack:
    first, last = row[0], row[-1]
    lengths = [_lengths(first)]
    for before, tile in itertools.pairwise(row):
        unseeing, unseen = (
            tile.queries.start - before.queries.stop,
            tile.keys.start - before.keys.stop,
        )
        lengths += [gap for gap in ((unseeing, 0), (0, unseen)) if any(gap)]
        lengths.append(_lengths(tile))
    queries, keys = (
        slice(first.queries.start, last.queries.stop),
        slice(first.keys.start, last.keys.stop),
    )
    return Pack(queries, keys, first.kind, tuple(lengths))


def _lengths(tile: Tile) -> tuple[int, int]:
    return tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
