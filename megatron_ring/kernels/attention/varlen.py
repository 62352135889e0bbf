r"""Group tiles into packed ("varlen") calls of flash-attn: many short sequences in one call.

Tiles with the same window whose queries and keys do not overlap lie along the diagonal of the hop
like packed documents. Two documents of 4 and 3 tokens, with one query and two keys between them
that take part in nothing, are one call of four sequences:

                 keys 4  2  3
                 _____________        lengths = ((4, 4), (1, 0), (0, 2), (3, 3))
    queries 4    \\\\ .. ...
            1    .... .. ...          as (queries, keys) of each sequence
            3    .... .. \\\

The unused queries are a sequence without keys, and the unused keys one without queries. So the
cumulative lengths cover both spans without a gap, and no tensor has to be copied.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ring.kernels.attention.tiles import Tile, TileKind, Window


@dataclass(frozen=True, eq=False)
class VarlenCall:
    """The sequences of one packed call, along the diagonal of the rectangle ``queries`` x ``keys``.

    window: what is visible in each sequence, relative to its own diagonal.
    lengths: the numbers of queries and keys of each sequence, in order; either may be 0.
    """

    queries: slice
    keys: slice
    window: Window
    lengths: tuple[tuple[int, int], ...]

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of any sequence, also of those without the other."""
        return tuple(max(lengths) for lengths in zip(*self.lengths))

    def cu_seqlens(self, samples: int) -> list[list[int]]:
        """Return the cumulative lengths of queries and of keys, for ``samples`` rectangles."""
        return [
            list(itertools.accumulate(lengths * samples, initial=0))
            for lengths in zip(*self.lengths)
        ]


def varlen_calls(tiles: Iterable[Tile]) -> Iterator[VarlenCall]:
    """Group the tiles that are not MASKED into calls, each into the first that it can follow."""
    chains: list[list[Tile]] = []
    for tile in tiles:
        if tile.kind is TileKind.MASKED:
            continue
        if chain := next((chain for chain in chains if _follows(tile, chain[-1])), None):
            chain.append(tile)
        else:
            chains.append([tile])
    return map(_call, chains)


def _follows(tile: Tile, last: Tile) -> bool:
    """Return whether a tile has the window of ``last`` and follows it in both queries and keys."""
    after = tile.queries.start >= last.queries.stop and tile.keys.start >= last.keys.stop
    return after and tile.window == last.window


def _call(chain: list[Tile]) -> VarlenCall:
    first, last = chain[0], chain[-1]
    lengths = [_lengths(first)]
    for previous, tile in itertools.pairwise(chain):
        unused_queries = tile.queries.start - previous.queries.stop
        unused_keys = tile.keys.start - previous.keys.stop
        if unused_queries:
            lengths.append((unused_queries, 0))
        if unused_keys:
            lengths.append((0, unused_keys))
        lengths.append(_lengths(tile))
    queries = slice(first.queries.start, last.queries.stop)
    keys = slice(first.keys.start, last.keys.stop)
    return VarlenCall(queries, keys, first.window, tuple(lengths))


def _lengths(tile: Tile) -> tuple[int, int]:
    return tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
