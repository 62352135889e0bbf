"""Rows of a shard that another rank needs: keys that its queries see, or queries for its keys.

A row is a token's part of a shard. Where documents are kept apart, or under a sliding window, a
rank needs few of another's rows. Both ends of a message derive them from the mask, so nothing is
negotiated.
"""

import functools
from dataclasses import dataclass, field

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.kernels.attention.key_ranges import KeyRanges, copy_async

MOST_READ = 0.5
"""Of the keys under a window, the share that another rank reads below which they are sent directly.
With more, little is saved, and a row that is forwarded enters each machine only once."""

_MOST_SAMPLED = 2**14
"""Keys that are looked at to estimate that share."""


def are_sent_directly(layout: Layout, mask: Mask) -> bool:
    """Return whether rows go straight from owner to reader, the same on all ranks.

    So it is with separate documents, and under windows that leave most rows unread.
    """
    if mask.document_starts:
        return True
    return mask.window > 0 and share_read(layout, mask.window) < MOST_READ


@functools.lru_cache(maxsize=64)
def share_read(layout: Layout, window: int) -> float:
    """Return the share of a rank's keys that another rank reads under a window; 1 for one rank.

    A mean over all pairs of ranks. The key at position p is read by the queries from p to
    p + ``window`` - 1. Of long samples, a part of the keys is counted.
    """
    if layout.ring_size == 1:
        return 1.0
    # An odd step reaches every position within a stripe.
    keys = torch.arange(0, layout.seq_length, layout.seq_length // _MOST_SAMPLED | 1)
    reading_ranks = torch.zeros(len(keys), dtype=torch.int64)
    for ring_rank in range(layout.ring_size):
        queries = layout.positions(ring_rank)
        later = torch.searchsorted(queries, keys)
        next_query = torch.cat([queries, queries.new_tensor([layout.seq_length + window])])[later]
        reading_ranks += next_query < keys + window
    others = reading_ranks - 1  # its owner reads a key too
    return int(others.sum()) / (len(keys) * (layout.ring_size - 1))


@dataclass(frozen=True, eq=False)
class VisibleRows:
    """Rows of a shard, and the key ranges of a hop that has only these.

    rows_n: indices in the shard, (n,) int64, increasing, on the CPU.
    is_whole: whether these are all rows.
    """

    rows_n: torch.Tensor
    is_whole: bool
    key_ranges: KeyRanges
    _on_device: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __len__(self) -> int:
        return len(self.rows_n)

    def on(self, device: torch.device) -> torch.Tensor:
        """Return ``rows_n`` on ``device``; copied once, without the host waiting."""
        if device not in self._on_device:
            self._on_device[device] = copy_async(self.rows_n, device)
        return self._on_device[device]


def visible_keys(layout: Layout, reader: int, owner: int, mask: Mask) -> VisibleRows:
    """Return the keys of ring rank ``owner`` that queries of ``reader`` see.

    Their key ranges count keys among these rows, for all queries of ``reader``.
    """
    return _cached("keys", layout, reader, owner, mask)


def queries_with_visible_keys(layout: Layout, reader: int, owner: int, mask: Mask) -> VisibleRows:
    """Return the queries of ring rank ``reader`` that see keys of ``owner``.

    Their key ranges are those of these queries, among all keys of ``owner``.
    """
    return _cached("queries", layout, reader, owner, mask)


def _cached(what: str, layout: Layout, reader: int, owner: int, mask: Mask) -> VisibleRows:
    key = what, layout, reader, owner
    if key not in mask.cached_visible_rows:
        ranges = hop_key_ranges(layout, reader, owner, mask)
        compute = _of_keys if what == "keys" else _of_queries
        mask.cached_visible_rows[key] = compute(ranges)
    return mask.cached_visible_rows[key]


def _of_keys(ranges: KeyRanges) -> VisibleRows:
    keys = len(ranges.lo)  # all shards are equally long
    sees = ranges.hi > ranges.lo
    # How many queries see a key is the sum of +1 at every lo and -1 at every hi up to it.
    change = torch.zeros(keys + 1, dtype=torch.int64)
    change.index_add_(0, ranges.lo[sees], torch.ones_like(ranges.lo[sees]))
    change.index_add_(0, ranges.hi[sees], -torch.ones_like(ranges.hi[sees]))
    is_visible = change.cumsum(0)[:keys] > 0
    rows_n = is_visible.nonzero().flatten()
    # All keys of a range are visible, so a range stays one; an empty one stays empty.
    new_index = torch.cat([torch.zeros(1, dtype=torch.int64), is_visible.cumsum(0)])
    key_ranges = KeyRanges(new_index[ranges.lo], new_index[ranges.hi])
    return VisibleRows(rows_n, len(rows_n) == keys, key_ranges)


def _of_queries(ranges: KeyRanges) -> VisibleRows:
    rows_n = (ranges.hi > ranges.lo).nonzero().flatten()
    is_whole = len(rows_n) == len(ranges.lo)
    return VisibleRows(rows_n, is_whole, KeyRanges(ranges.lo[rows_n], ranges.hi[rows_n]))
