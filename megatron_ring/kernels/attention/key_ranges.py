r"""The mask as key ranges: query i sees the keys ``[lo[i], hi[i])`` of another shard.

One pair of integers per query expresses causal masks, sliding windows and packed documents, in
every layout and stripe size. Both bounds are non-decreasing along the queries. Four queries of a
rank and the four keys of its successor in a striped ring of two (tokens 0 2 4 6 and 1 3 5 7), with
a window of 4:

    query 0    . . . .    [0, 0)
    query 2    x . . .    [0, 1)      tiles.py      covers the visible pairs with tiles
    query 4    x x . .    [0, 2)      varlen.py     groups tiles into packed calls
    query 6    . x x .    [1, 3)      Triton        reads lo and hi directly

``context_parallel/mask.py`` computes the ranges from the layout. Nothing here depends on where
tokens are or on ranks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_ring.kernels.attention.tile_lists import tile_list
from megatron_ring.kernels.attention.tiles import Tile, Tiling, cover
from megatron_ring.kernels.attention.varlen import VarlenCall, varlen_calls

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The keys of one shard that each query of another sees: ``lo`` and ``hi``, (L,) int64.

    Both are non-decreasing. Everything derived from them is computed once and kept, because all
    layers of a model share it.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    _tiles: dict[Tiling, tuple[Tile, ...]] = field(default_factory=dict, init=False, repr=False)
    _calls: dict[Tiling, tuple[VarlenCall, ...]] = field(
        default_factory=dict, init=False, repr=False
    )
    _on_device: dict[tuple, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def visible_pairs(self) -> int:
        """The number of visible (query, key) pairs, which is the work of the hop."""
        return int((self.hi - self.lo).clamp(min=0).sum())

    def tiles(self, tiling: Tiling) -> tuple[Tile, ...]:
        """Return tiles that cover each visible pair exactly once."""
        if tiling not in self._tiles:
            self._tiles[tiling] = tuple(cover(self.lo, self.hi, tiling))
        return self._tiles[tiling]

    def varlen_calls(self, tiling: Tiling) -> tuple[VarlenCall, ...]:
        """Group the tiles that need no mask into packed calls."""
        if tiling not in self._calls:
            self._calls[tiling] = tuple(varlen_calls(self.tiles(tiling)))
        return self._calls[tiling]

    def cu_seqlens(self, call: VarlenCall, samples: int, device: torch.device) -> torch.Tensor:
        """Return the cumulative lengths of ``call``, (2, sequences + 1) int32 on ``device``."""
        return self._kept(
            ("cu_seqlens", call, samples, device), lambda: torch.tensor(call.cu_seqlens(samples))
        )

    def bounds(self, device: torch.device) -> torch.Tensor:
        """Return ``lo`` and ``hi`` on ``device``, (2, L) int32."""
        return self._kept(("bounds", device), lambda: torch.stack([self.lo, self.hi]))

    def query_ranges(self, keys: int, device: torch.device) -> torch.Tensor:
        """Return the queries [from, to) that see each key, (2, keys) int32 on ``device``."""
        return self._kept(
            ("query_ranges", keys, device), lambda: torch.stack(self._transposed(keys))
        )

    def query_tiles(self, block_q: int, block_k: int, device: torch.device) -> torch.Tensor:
        """Return the tiles of queries that see a key, (tiles, 5) int32 on ``device``.

        A row has the fields of ``TileList``, for loops over keys in steps of ``block_k``.
        """
        return self._kept(
            ("query_tiles", block_q, block_k, device),
            lambda: torch.stack(tile_list(self.lo, self.hi, block_q, block_k), 1),
        )

    def key_tiles(
        self, keys: int, block_k: int, block_q: int, device: torch.device
    ) -> torch.Tensor:
        """Return the tiles of keys that are seen, (tiles, 5) int32 on ``device``.

        A row has the fields of ``TileList``, for loops over queries in steps of ``block_q``.
        """
        return self._kept(
            ("key_tiles", keys, block_k, block_q, device),
            lambda: torch.stack(tile_list(*self._transposed(keys), block_k, block_q), 1),
        )

    def _transposed(self, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries [from, to) that see each key, both (keys,) int64."""
        key = torch.arange(keys)
        first = torch.searchsorted(self.hi, key, right=True)
        return first, torch.searchsorted(self.lo, key, right=True)

    def _kept(self, name: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a tensor once and copy it as int32, on the current stream, to ``name[-1]``."""
        if name not in self._on_device:
            self._on_device[name] = copy_async(compute().to(torch.int32), name[-1])
        return self._on_device[name]

    def visible(self, tile: Tile, device: torch.device = _CPU) -> torch.Tensor:
        """Compute the mask of ``tile`` on ``device``: (queries, keys) bool, True where visible."""
        keys = torch.arange(tile.keys.start, tile.keys.stop, device=device)
        lo, hi = self.bounds(device)[:, tile.queries, None]
        return (lo <= keys) & (keys < hi)


def copy_async(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to ``device`` on the current stream, without the host waiting.

    A copy from pageable memory, or a blocking one, would wait until everything queued before it is
    done: in the middle of a ring, with the next exchange not yet posted. Torch reuses pinned memory
    only after the copy.
    """
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
