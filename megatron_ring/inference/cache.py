"""The key-value cache of a batch of samples, sharded over the ring by position.

A rank stores the keys and values of the positions that it owns. Which rank owns which position is
plain arithmetic (``chunk_owners``), so every rank has the whole table, ``Ownership``, without
communication, and its own entries in increasing order of position. What a query with a window sees
of a rank's entries is therefore always the last ones, and a windowed layer stores no more than
these (docs/decisions/0026).

In shapes, ``M`` is the entries of one sample on this rank, ``c`` those that are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.errors import ConfigError

# Free entries of a windowed layer's buffer: its entries are moved to the front once for as many
# generated tokens that this rank owns.
_FREE_ENTRIES = 64


def chunk_owners(
    layout_name: str, stripe_size: int, ring_size: int, start: int, tokens: int
) -> torch.Tensor:
    """Return the ring rank that owns each of the positions from ``start``: (tokens,) int16.

    The positions are those of a layout of the next legal length, without those past the end. Its
    ranks are rotated by ``start``, so that position p belongs to rank p mod R under stripes of one
    token, wherever a chunk starts.
    """
    layout = Layout.of_at_least(tokens, layout_name, ring_size, stripe_size)
    owners = torch.empty(layout.seq_length, dtype=torch.int16)
    for rank in range(ring_size):
        owners[layout.positions(rank)] = (rank + start) % ring_size
    return owners[:tokens]


class Ownership:
    """The ring rank that owns each position of each sample; the same on every rank.

    lengths: tokens of each sample so far. Positions and counts from ``start`` are those of cached
    positions p >= start; a negative start is 0.
    """

    def __init__(self, capacity: Sequence[int]):
        self.lengths = [0] * len(capacity)
        self._owners = [torch.empty(tokens, dtype=torch.int16) for tokens in capacity]

    def append(self, sample: int, owners: torch.Tensor) -> None:
        """Record the owners of the sample's next positions."""
        start = self.lengths[sample]
        self._owners[sample][start : start + len(owners)] = owners
        self.lengths[sample] += len(owners)

    def positions(self, sample: int, rank: int, start: int = 0) -> torch.Tensor:
        """Return the positions that ``rank`` owns from ``start``: int64, increasing."""
        start = max(start, 0)
        return start + torch.nonzero(self._owners_from(sample, start) == rank).flatten()

    def count(self, sample: int, rank: int, start: int = 0) -> int:
        """Return how many positions from ``start`` ``rank`` owns."""
        return int((self._owners_from(sample, max(start, 0)) == rank).sum())

    def _owners_from(self, sample: int, start: int) -> torch.Tensor:
        return self._owners[sample][start : self.lengths[sample]]


class KeyValues:
    """Keys and values of one sample in one layer on this rank, in increasing order of position.

    A layer without a window stores all of them. One with a window stores the last ones, as many as
    the next query sees and a few more. Keys of one head are adjacent in memory, so that a query is
    attended by one batched product over the heads, without copies.
    """

    def __init__(self, buffer_2GMD: torch.Tensor, window: int):
        self._buffer_2GMD = buffer_2GMD
        self.window = window
        self.entries = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self._buffer_2GMD.nbytes

    def last(self, entries: int) -> torch.Tensor:
        """Return a view of the last ``entries``, (2, G, entries, D): keys, then values."""
        assert entries <= self.entries
        return self._buffer_2GMD[:, :, self.entries - entries : self.entries]

    def append(self, k_cGD: torch.Tensor, v_cGD: torch.Tensor, still_seen: int) -> None:
        """Add entries of the next positions; of the old ones, keep at least ``still_seen``."""
        count = len(k_cGD)
        if self.entries + count > self._buffer_2GMD.shape[2]:
            self._make_room(count, still_seen)
        self._write(k_cGD, v_cGD)

    def extend(
        self, k_cGD: torch.Tensor, v_cGD: torch.Tensor, seen: int, still_seen: int
    ) -> torch.Tensor:
        """Add a chunk's entries and return what its queries see, (2, G, seen + c, D).

        ``seen`` is the number of old entries in reach of the chunk's first query, ``still_seen``
        that of all entries in reach of the first query after the chunk. The result is a view for a
        layer without a window. For one with a window it is a copy, because the cache may store less
        than that.
        """
        if not self.window:
            self.append(k_cGD, v_cGD, self.entries)
            return self.last(seen + len(k_cGD))
        two, heads, _, head_dim = self._buffer_2GMD.shape
        all_2GMD = self._buffer_2GMD.new_empty((two, heads, seen + len(k_cGD), head_dim))
        all_2GMD[:, :, :seen] = self.last(seen)
        all_2GMD[0, :, seen:] = k_cGD.transpose(0, 1)
        all_2GMD[1, :, seen:] = v_cGD.transpose(0, 1)
        if still_seen > self._buffer_2GMD.shape[2]:
            self._reallocate(still_seen + _FREE_ENTRIES)
        self.entries = still_seen
        self.last(still_seen).copy_(all_2GMD[:, :, all_2GMD.shape[2] - still_seen :])
        return all_2GMD

    def _write(self, k_cGD: torch.Tensor, v_cGD: torch.Tensor) -> None:
        new = slice(self.entries, self.entries + len(k_cGD))
        self._buffer_2GMD[0, :, new] = k_cGD.transpose(0, 1)
        self._buffer_2GMD[1, :, new] = v_cGD.transpose(0, 1)
        self.entries = new.stop

    def _make_room(self, count: int, still_seen: int) -> None:
        """Move what is still seen to the front of the buffer, or of a larger one."""
        kept_2GMD = self.last(still_seen)
        if still_seen + count > self._buffer_2GMD.shape[2]:
            self._reallocate(still_seen + count + _FREE_ENTRIES)
        else:
            kept_2GMD = kept_2GMD.clone()  # source and target may overlap
        self.entries = still_seen
        self.last(still_seen).copy_(kept_2GMD)

    def _reallocate(self, entries: int) -> None:
        two, heads, _, head_dim = self._buffer_2GMD.shape
        self._buffer_2GMD = self._buffer_2GMD.new_empty((two, heads, entries, head_dim))


@dataclass(frozen=True)
class CacheShape:
    """What determines the size of a cache on one rank, apart from the number of tokens.

    Attributes:
        windows: the window of each layer by its number, 0 for none.
        key_value_heads: of this tensor rank.
        layout_name: of prefill, with its ``stripe_size``.
    """

    windows: dict[int, int]
    key_value_heads: int
    head_dim: int
    ring_size: int
    ring_rank: int
    layout_name: str
    stripe_size: int = 1

    def entries(self, capacity: int, window: int) -> int:
        """Return the entries that a layer allocates for a sample of up to ``capacity`` tokens.

        Exact under stripes of one token. Under other layouts a rank may own more of a prompt, or of
        a window, than its share, and a buffer that is too small is replaced by a larger one.
        """
        share = self._share(capacity)
        return min(share, self._share(window) + _FREE_ENTRIES) if window else share

    def _share(self, tokens: int) -> int:
        if self.layout_name == "striped" and self.stripe_size == 1:
            return -(-tokens // self.ring_size)
        layout = Layout.of_at_least(tokens, self.layout_name, self.ring_size, self.stripe_size)
        return layout.shard_length + 1

    def nbytes(self, capacity: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of a cache for samples of up to ``capacity`` tokens each."""
        entries = sum(
            self.entries(tokens, window) for window in self.windows.values() for tokens in capacity
        )
        return 2 * entries * self.key_value_heads * self.head_dim * dtype.itemsize


class Cache:
    """The cache of a batch of samples; ``InferenceModel`` creates and fills it.

    capacity: the most tokens of each sample, prompt and generated ones.
    """

    def __init__(
        self,
        shape: CacheShape,
        capacity: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.shape = shape
        self.capacity = list(capacity)
        self.ownership = Ownership(capacity)
        self.layers: dict[int, list[KeyValues]] = {
            layer: [
                KeyValues(
                    torch.empty(
                        (2, shape.key_value_heads, shape.entries(tokens, window), shape.head_dim),
                        dtype=dtype,
                        device=device,
                    ),
                    window,
                )
                for tokens in capacity
            ]
            for layer, window in shape.windows.items()
        }

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.capacity)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample that are in the cache, over all ranks."""
        return self.ownership.lengths

    @property
    def nbytes(self) -> int:
        """Bytes that this rank has allocated for keys and values."""
        return sum(kv.nbytes for samples in self.layers.values() for kv in samples)

    def check_room(self, sample: int, tokens: int) -> None:
        """Raise ConfigError if ``tokens`` more tokens do not fit."""
        cached = self.lengths[sample]
        if cached + tokens > self.capacity[sample]:
            raise ConfigError(
                f"sample {sample} has {cached} tokens in its cache, and {tokens} more exceed its "
                f"capacity of {self.capacity[sample]}: at most "
                f"{self.capacity[sample] - cached} fit. Set --max-new-tokens, or use a shorter "
                "prompt."
            )
