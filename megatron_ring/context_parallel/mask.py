"""From positions to key ranges: which contiguous range of another rank's keys each query sees.

A query at position p sees the keys in ``[first(p), p]``, where first(p) is the start of its
document or of its window, whichever is later. Layouts list positions in increasing order, so among
the keys of one rank that is one range. Triangles and rectangles, strict or not, follow from it and
need no case of their own: under the striped layout, an earlier source rank gives j <= i and a later
one j < i (Brandon et al. 2023, section 3.2).
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ring.context_parallel.batch_cache import BatchCache
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.placement import Placement, place_samples, placed_positions
from megatron_ring.kernels.attention.key_ranges import KeyRanges


@dataclass(frozen=True)
class Mask:
    """Restricts causal attention by a sliding window, by packed documents, by both or not at all.

    Attributes:
        window: a token sees itself and the ``window`` - 1 tokens before it; 0 for no window.
        document_starts: where documents begin, increasing from 0; () for one document per sample.
        samples: number of concatenated samples. A batch of packed samples is one longer packed
            sample in which each sample begins a document.
        placements: of each sample, None for one in the layout's order; () if all are.
        cached_key_ranges: cache of ``hop_key_ranges``, which lives as long as the mask.
        cached_visible_rows: the same for visible_rows.py.
    """

    window: int = 0
    document_starts: tuple[int, ...] = ()
    samples: int = 1
    placements: tuple[Placement | None, ...] = ()
    cached_key_ranges: dict[tuple[Layout, int, int], KeyRanges] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    cached_visible_rows: dict[tuple[str, Layout, int, int], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        assert self.samples == 1 or self.document_starts, (
            "concatenated samples need document_starts to separate them"
        )
        assert not self.placements or len(self.placements) == self.samples

    def first_visible(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return first(p) for each of ``positions``, non-decreasing; None if it is 0 for all."""
        first = None
        if self.document_starts:
            starts = torch.tensor(self.document_starts)
            first = starts[torch.searchsorted(starts, positions, right=True) - 1]
        if self.window:
            oldest = positions - self.window + 1
            first = oldest if first is None else torch.maximum(first, oldest)
        return first


CAUSAL = Mask()


def compute_key_ranges(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    first_visible: torch.Tensor | None = None,
) -> KeyRanges:
    """Return the range of keys that each query sees, given the positions of both, increasing.

    ``first_visible`` is first(p) for each query, non-decreasing; without it a query sees everything
    up to itself.
    """
    hi = torch.searchsorted(key_positions, query_positions, right=True)
    if first_visible is None:
        return KeyRanges(torch.zeros_like(hi), hi)
    return KeyRanges(torch.searchsorted(key_positions, first_visible), hi)


def hop_key_ranges(layout: Layout, ring_rank: int, source: int, mask: Mask = CAUSAL) -> KeyRanges:
    """Return what the queries of ``ring_rank`` see of the keys of ring rank ``source``.

    The result is cached in ``mask``: every layer needs the same ranges, forward and backward.
    """
    key = layout, ring_rank, source
    if key not in mask.cached_key_ranges:
        if len(mask.cached_key_ranges) >= _MAX_CACHED:
            mask.cached_key_ranges.pop(next(iter(mask.cached_key_ranges)))
        queries = concatenated_positions(layout, ring_rank, mask)
        keys = concatenated_positions(layout, source, mask)
        mask.cached_key_ranges[key] = compute_key_ranges(queries, keys, mask.first_visible(queries))
    return mask.cached_key_ranges[key]


@functools.lru_cache(maxsize=64)
def mask_of_window(window: int) -> Mask:
    """Return the mask of samples that are one document each."""
    return Mask(window)


def mask_of_documents(
    document_starts: torch.Tensor, window: int, samples: int, layout: Layout
) -> Mask:
    """Return the mask of a batch of packed samples; the same object for every call of one batch.

    The mask and its cached ranges live as long as the tensor ``document_starts``, which is as long
    as its batch is in flight.
    """

    def create() -> Mask:
        placements = place_samples(document_starts, samples, layout)
        return Mask(window, tuple(document_starts.tolist()), samples, placements)

    return _MASKS_OF_BATCHES.get(document_starts, (window, samples, layout), create)


# A mask without documents lives as long as the process, and benchmarks use it with many layouts.
_MAX_CACHED = 1024
_MASKS_OF_BATCHES = BatchCache()


def concatenated_positions(layout: Layout, ring_rank: int, mask: Mask) -> torch.Tensor:
    """Return the positions of the rank's tokens in all ``mask.samples`` samples, end to end."""
    offsets_B1 = torch.arange(mask.samples)[:, None] * layout.seq_length
    if mask.placements:
        return (offsets_B1 + placed_positions(layout, mask.placements, ring_rank)).flatten()
    return (offsets_B1 + layout.positions(ring_rank)).flatten()
