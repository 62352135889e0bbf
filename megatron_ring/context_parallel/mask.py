"""From positions to the mask language: which run of a source's keys each query sees.

A query at position p may see the keys in ``[first(p), p]``. Layouts list positions in increasing order, so among one
source's keys that is one run. Whole triangles and rectangles, strict or not, follow from it and are stated nowhere:
under the striped layout a source behind us gives j <= i, a source ahead of us j < i (Brandon et al. 2023, section 3.2).
"""

import functools

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention.runs import KeyRuns


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


@functools.lru_cache(maxsize=4096)
def hop_runs(layout: Layout, ring_rank: int, source: int) -> KeyRuns:
    """What the queries of ``ring_rank`` see of the keys of ``source`` under ``layout``; the same at every step."""
    return key_runs(layout.positions(ring_rank), layout.positions(source))
