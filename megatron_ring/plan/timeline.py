"""Who works when: the visible pairs of every rank in every hop, the critical path, and the bounds that follow.

A hop ends when its slowest rank is done, so a ring takes the sum over hops of the slowest rank. Under the contiguous
layout that is nearly R full hops; balanced, it is R half-full ones: the speed-up of balance is at most 2 - 1/R
(Brandon et al. 2023, section 3.3).
"""

from dataclasses import dataclass

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_runs


@dataclass(frozen=True)
class Timeline:
    """work_RR[hop, ring_rank]: pairs, or seconds where hops were timed; (R, R) float64."""

    work_RR: torch.Tensor

    @property
    def critical_path(self) -> float:
        """Sum over hops of the slowest rank's work."""
        return float(self.work_RR.max(dim=1).values.sum())

    @property
    def imbalance(self) -> float:
        """Work of the slowest rank over that of the mean rank; 1 is perfect balance."""
        per_rank = self.work_RR.sum(dim=0)
        return float(per_rank.max() / per_rank.mean())

    @property
    def gain_of_balance(self) -> float:
        """How many times faster the same work would be done if every rank had its equal share of every hop."""
        return self.critical_path / float(self.work_RR.sum(dim=0).mean())


def counted(layout: Layout, mask: Mask = CAUSAL) -> Timeline:
    """The visible (query, key) pairs of every hop and rank."""
    ranks = range(layout.ring_size)

    def pairs(rank: int, hop: int) -> int:
        return hop_runs(layout, rank, (rank - hop) % layout.ring_size, mask).visible_pairs

    return Timeline(
        torch.tensor([[pairs(rank, hop) for rank in ranks] for hop in ranks], dtype=torch.float64)
    )


def bound_over_ring(layout_name: str, ring_size: int) -> float:
    """The most that a layout can gain over the contiguous ring, when hops cost what is visible in them.

    For causal attention over one long document; under any other mask it is the ring's own ``gain_of_balance``.
    """
    return 1.0 if layout_name == "ring" else 2 - 1 / ring_size
