"""From positions to the mask language: which run of a source's keys each query sees.

A query at position p may see the keys in ``[first(p), p]``, where first(p) is the start of its document or the far end
of its window, whichever is nearer. Layouts list positions in increasing order, so among one source's keys that is one
run. Whole triangles and rectangles, strict or not, follow from it and are stated nowhere: under the striped layout a
source behind us gives j <= i, a source ahead of us j < i (Brandon et al. 2023, section 3.2).
"""

import functools
from dataclasses import dataclass

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention.runs import KeyRuns


@dataclass(frozen=True)
class Mask:
    """What narrows causal attention: a sliding window, the documents of a pack, both or neither.

    window: a token sees itself and the ``window`` - 1 before it; 0 is no window.
    document_starts: where documents begin, increasing from 0; () is one document a sample.
    samples: how many samples are laid end to end. A batch of packs is one longer pack: each sample begins a document.
    """

    window: int = 0
    document_starts: tuple[int, ...] = ()
    samples: int = 1

    def __post_init__(self):
        assert self.samples == 1 or self.document_starts, "samples end to end, and nothing that keeps them apart"

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
    query_positions: torch.Tensor, key_positions: torch.Tensor, first_visible: torch.Tensor | None = None
) -> KeyRuns:
    """The runs of keys that queries at ``query_positions`` see among keys at ``key_positions``, both increasing.

    ``first_visible`` is first(p) for each query, non-decreasing; without it a query sees everything up to itself.
    """
    hi = torch.searchsorted(key_positions, query_positions, right=True)
    if first_visible is None:
        return KeyRuns(torch.zeros_like(hi), hi)
    return KeyRuns(torch.searchsorted(key_positions, first_visible), hi)


# The layers of a model ask for the same runs, forward and backward, so those of the batches in flight are kept.
@functools.lru_cache(maxsize=1024)
def hop_runs(layout: Layout, ring_rank: int, source: int, mask: Mask = CAUSAL) -> KeyRuns:
    """What the queries of ``ring_rank`` see of the keys of ``source`` under ``layout`` and ``mask``."""
    queries, keys = (_end_to_end(layout.positions(rank), layout, mask) for rank in (ring_rank, source))
    return key_runs(queries, keys, mask.first_visible(queries))


def _end_to_end(positions_L: torch.Tensor, layout: Layout, mask: Mask) -> torch.Tensor:
    return (torch.arange(mask.samples)[:, None] * layout.seq_length + positions_L).flatten()
