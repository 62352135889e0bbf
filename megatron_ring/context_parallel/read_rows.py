"""Rows of a shard that another rank needs: keys that its queries see, or queries for its keys.

Where documents are kept apart, or placed, most ranks read few of another's rows. Both ends of a
message derive the rows from the mask, so nothing is negotiated.
"""

from dataclasses import dataclass, field

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.kernels.attention.key_ranges import KeyRanges, copy_async


@dataclass(frozen=True, eq=False)
class ReadRows:
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


def read_keys(layout: Layout, reader: int, owner: int, mask: Mask) -> ReadRows:
    """Return the keys of ring rank ``owner`` that queries of ``reader`` see.

    Their key ranges count keys among these rows, for all queries of ``reader``.
    """
    return _kept("keys", layout, reader, owner, mask)


def reading_queries(layout: Layout, reader: int, owner: int, mask: Mask) -> ReadRows:
    """Return the queries of ring rank ``reader`` that see keys of ``owner``.

    Their key ranges are those of these queries, among all keys of ``owner``.
    """
    return _kept("queries", layout, reader, owner, mask)


def _kept(what: str, layout: Layout, reader: int, owner: int, mask: Mask) -> ReadRows:
    key = what, layout, reader, owner
    if key not in mask.cached_read_rows:
        ranges = hop_key_ranges(layout, reader, owner, mask)
        compute = _keys_read if what == "keys" else _queries_that_read
        mask.cached_read_rows[key] = compute(ranges)
    return mask.cached_read_rows[key]


def _keys_read(ranges: KeyRanges) -> ReadRows:
    sees = ranges.hi > ranges.lo
    keys = len(ranges.lo)  # all shards are equally long
    steps = torch.zeros(keys + 1, dtype=torch.int64)
    steps.index_add_(0, ranges.lo[sees], torch.ones_like(ranges.lo[sees]))
    steps.index_add_(0, ranges.hi[sees], -torch.ones_like(ranges.hi[sees]))
    is_read = steps.cumsum(0)[:keys] > 0
    before = torch.cat([torch.zeros(1, dtype=torch.int64), is_read.cumsum(0)])
    rows_n = is_read.nonzero().flatten()
    # All keys of a range are read, so a range stays one; an empty one stays empty.
    return ReadRows(rows_n, len(rows_n) == keys, KeyRanges(before[ranges.lo], before[ranges.hi]))


def _queries_that_read(ranges: KeyRanges) -> ReadRows:
    rows_n = (ranges.hi > ranges.lo).nonzero().flatten()
    is_whole = len(rows_n) == len(ranges.lo)
    return ReadRows(rows_n, is_whole, KeyRanges(ranges.lo[rows_n], ranges.hi[rows_n]))
