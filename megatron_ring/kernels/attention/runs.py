"""The mask language: query i sees the keys of one run ``[lo[i], hi[i])``, and what kernels ask of such runs.

One pair of integers per query says causal, sliding window and packed documents, under every layout and stripe size.
Both bounds are non-decreasing along the queries. Nothing here knows where tokens live or who computes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_ring.kernels.attention.packs import Pack, packed
from megatron_ring.kernels.attention.tiles import Tile, Tiling, cover

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """The runs of keys that a shard of queries sees in another shard: ``lo``, ``hi``, (L,) int64, non-decreasing."""

    lo: torch.Tensor
    hi: torch.Tensor
    _tiles: dict[Tiling, tuple[Tile, ...]] = field(default_factory=dict, init=False, repr=False)
    _packs: dict[Tiling, tuple[Pack, ...]] = field(default_factory=dict, init=False, repr=False)
    _on_device: dict[tuple, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible: the work of the hop."""
        return int((self.hi - self.lo).clamp(min=0).sum())

    def tiles(self, tiling: Tiling) -> tuple[Tile, ...]:
        """The tiles that cover the runs, each visible pair exactly once; computed once per tiling and kept."""
        if tiling not in self._tiles:
            self._tiles[tiling] = tuple(cover(self.lo, self.hi, tiling))
        return self._tiles[tiling]

    def packs(self, tiling: Tiling) -> tuple[Pack, ...]:
        """The tiles that need no mask, as many as can in one call; computed once per tiling and kept."""
        if tiling not in self._packs:
            self._packs[tiling] = tuple(packed(self.tiles(tiling)))
        return self._packs[tiling]

    def pack_bounds(self, pack: Pack, samples: int, device: torch.device) -> torch.Tensor:
        """Where the sequences of ``pack`` begin and end, (2, sequences + 1) int32, on ``device``; put there once."""
        return self._kept(
            ("pack", pack, samples, device), lambda: torch.tensor(pack.bounds(samples))
        )

    def bounds(self, device: torch.device) -> torch.Tensor:
        """lo and hi, (2, L) int32, on ``device``; put there once, on the current stream, and kept."""
        return self._kept(("bounds", device), lambda: torch.stack([self.lo, self.hi]))

    def query_ranges(self, keys: int, device: torch.device) -> torch.Tensor:
        """The runs read the other way, (2, keys) int32, on ``device``: by which queries, from and to, a key is seen.

        Put there once, on the current stream, and kept.
        """

        def found() -> torch.Tensor:
            key = torch.arange(keys)
            return torch.stack(
                [torch.searchsorted(bound, key, right=True) for bound in (self.hi, self.lo)]
            )

        return self._kept(("query_ranges", keys, device), found)

    def _kept(self, name: tuple, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self._on_device:
            self._on_device[name] = _put(compute().to(torch.int32), name[-1])
        return self._on_device[name]

    def visible(self, tile: Tile, device: torch.device = _CPU) -> torch.Tensor:
        """Which keys of ``tile`` each of its queries sees: (queries, keys) bool, found on ``device``."""
        keys = torch.arange(tile.keys.start, tile.keys.stop, device=device)
        lo, hi = self.bounds(device)[:, tile.queries, None]
        return (lo <= keys) & (keys < hi)


def _put(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``, by a copy that queues on the current stream and that the host does not wait for.

    Out of pageable memory, or where nobody says otherwise, it would wait until all that was queued before is done too:
    in the midst of a ring, with the next exchange yet to be posted. Torch reuses pinned memory behind the copy.
    """
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
