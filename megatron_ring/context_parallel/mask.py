"""From positions to the mask language: which run of a source's keys each query sees.

A query at position p may see the keys in ``[first(p), p]``, where first(p) is the start of its document or the far end
of its window, whichever is nearer. Layouts list positions in increasing order, so among one source's keys that is one
run. Whole triangles and rectangles, strict or not, follow from it and are stated nowhere: under the striped layout a
source behind us gives j <= i, a source ahead of us j < i (Brandon et al. 2023, section 3.2).
"""

import functools
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention.runs import KeyRanges


@dataclass(frozen=True)
class Mask:
    """What narrows causal attention: a sliding window, the documents of a pack, both or neither.

    window: a token sees itself and the ``window`` - 1 before it; 0 is no window.
    document_starts: where documents begin, increasing from 0; () is one document a sample.
    samples: how many samples are laid end to end. A batch of packs is one longer pack: each sample begins a document.
    runs: what ``hop_runs`` has computed under this mask, kept for as long as the mask is.
    """

    window: int = 0
    document_starts: tuple[int, ...] = ()
    samples: int = 1
    runs: dict[tuple[Layout, int, int], KeyRanges] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        assert self.samples == 1 or self.document_starts, (
            "samples end to end, and nothing that keeps them apart"
        )

    def first_visible(self, positions: torch.Tensor) -> torch.Tensor | None:
        """first(p) of each of ``positions``, non-decreasing as they are; None where it is 0 for all."""
        first = None
        if self.document_starts:
            starts = torch.tensor(self.document_starts)
            first = starts[torch.searchsorted(starts, positions, right=True) - 1]
        if self.window:
            oldest = positions - self.window + 1
            first = oldest if first is None else torch.maximum(first, oldest)
        return first

    def reach(self, seq_length: int) -> int:
        """How far back a query looks at most: the largest p - first(p)."""
        reach = seq_length - 1
        if self.document_starts:
            bounds = torch.tensor([*self.document_starts, self.samples * seq_length])
            reach = int(bounds.diff().max()) - 1
        return min(reach, self.window - 1) if self.window else reach


CAUSAL = Mask()


def key_runs(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    first_visible: torch.Tensor | None = None,
) -> KeyRanges:
    """The runs of keys that queries at ``query_positions`` see among keys at ``key_positions``, both increasing.

    ``first_visible`` is first(p) for each query, non-decreasing; without it a query sees everything up to itself.
    """
    hi = torch.searchsorted(key_positions, query_positions, right=True)
    if first_visible is None:
        return KeyRanges(torch.zeros_like(hi), hi)
    return KeyRanges(torch.searchsorted(key_positions, first_visible), hi)


def hop_runs(layout: Layout, ring_rank: int, source: int, mask: Mask = CAUSAL) -> KeyRanges:
    """What the queries of ``ring_rank`` see of the keys of ``source`` under ``layout`` and ``mask``.

    Computed once and kept in ``mask``, since every layer needs the same runs, forward and backward.
    """
    key = layout, ring_rank, source
    if key not in mask.runs:
        if len(mask.runs) >= _MOST_RUNS:
            mask.runs.pop(next(iter(mask.runs)))
        queries, keys = (
            _end_to_end(layout.positions(rank), layout, mask) for rank in (ring_rank, source)
        )
        mask.runs[key] = key_runs(queries, keys, mask.first_visible(queries))
    return mask.runs[key]


@functools.lru_cache(maxsize=64)
def mask_of_window(window: int) -> Mask:
    """The mask of samples that are one document each."""
    return Mask(window)


def mask_of_documents(document_starts: torch.Tensor, window: int, samples: int) -> Mask:
    """The mask of a batch of packs; the same object for every call of one batch.

    The mask, with the runs in it, lives as long as the tensor ``document_starts``, that is as long
    as its batch is in flight. Runs of earlier batches are of no use, and at a million tokens they
    are 16 MB a batch. A buffer that was refilled for another batch is told by its content.
    """
    content, masks = _MASKS_OF_BATCHES.get(document_starts, (None, {}))
    if content is None or not torch.equal(content, document_starts):
        masks = {}
        _MASKS_OF_BATCHES[document_starts] = document_starts.clone(), masks
    if (window, samples) not in masks:
        masks[window, samples] = Mask(window, tuple(document_starts.tolist()), samples)
    return masks[window, samples]


# A mask without documents serves a whole run, and tools use it with many layouts.
_MOST_RUNS = 1024
_MASKS_OF_BATCHES = WeakTensorKeyDictionary()


def _end_to_end(positions_L: torch.Tensor, layout: Layout, mask: Mask) -> torch.Tensor:
    return (torch.arange(mask.samples)[:, None] * layout.seq_length + positions_L).flatten()
