"""Work of every rank in every hop in visible pairs, its time in lockstep, and bounds that follow.

If all ranks began a hop together, a ring would take the sum over hops of the slowest rank. Under
the contiguous layout that is nearly R full hops; a balanced one has R half-full hops: balancing
speeds the ring up by at most 2 - 1/R (Brandon et al. 2023, section 3.3). Where hops are uneven a
ring takes less, since a rank waits only for those it exchanges with
(context_parallel/sample_blocks.py, ``critical_path``).
"""

from dataclasses import dataclass

import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import (
    CAUSAL,
    Mask,
    concatenated_positions,
    hop_key_ranges,
)
from megatron_ring.context_parallel.visible_rows import are_sent_directly
from megatron_ring.parallel.peers import peers_at_distance, peers_in_hop


@dataclass(frozen=True)
class Timeline:
    """work_RR[hop, ring_rank]: pairs, or seconds where hops were timed; (R, R) float64."""

    work_RR: torch.Tensor

    @property
    def lockstep_time(self) -> float:
        """The sum over hops of the slowest rank's work: an upper bound of the ring's time."""
        return float(self.work_RR.max(dim=1).values.sum())

    @property
    def imbalance(self) -> float:
        """Work of the slowest rank over that of the mean rank; 1 is perfect balance."""
        per_rank = self.work_RR.sum(dim=0)
        return float(per_rank.max() / per_rank.mean())

    @property
    def gain_of_balance(self) -> float:
        """The speed-up if every rank had an equal share of every hop's work."""
        return self.lockstep_time / float(self.work_RR.sum(dim=0).mean())


def visible_pairs_per_hop(
    layout: Layout, mask: Mask = CAUSAL, sends_all_rows: bool = False
) -> Timeline:
    """Return the visible (query, key) pairs of every hop and rank.

    ``sends_all_rows`` as in ``Ring``.
    """
    ranks = range(layout.ring_size)

    def pairs(rank: int, hop: int) -> int:
        source = keys_of_hop(layout, mask, rank, hop, sends_all_rows)
        return hop_key_ranges(layout, rank, source, mask).visible_pairs

    work = [[pairs(rank, hop) for rank in ranks] for hop in ranks]
    return Timeline(torch.tensor(work, dtype=torch.float64))


def keys_of_hop(
    layout: Layout, mask: Mask, ring_rank: int, hop: int, sends_all_rows: bool = False
) -> int:
    """Return the ring rank whose keys ``ring_rank`` has in a hop.

    Around the ring it is ``hop`` ranks back; where rows are sent directly, it follows the order of
    parallel/peers.py. ``sends_all_rows`` as in ``Ring``.
    """
    is_direct = are_sent_directly(layout, mask) and not sends_all_rows
    peers = peers_in_hop if is_direct else peers_at_distance
    return peers(ring_rank, layout.ring_size, hop).sender


def visible_pairs_per_rank(layout: Layout, mask: Mask = CAUSAL) -> torch.Tensor:
    """Return the visible (query, key) pairs of every rank over all hops: (R,) float64.

    Equals ``visible_pairs_per_hop(layout, mask).work_RR.sum(dim=0)``, but visits each token once
    where that visits each shard R times.
    """
    pairs = []
    for rank in range(layout.ring_size):
        queries = concatenated_positions(layout, rank, mask)
        first = mask.first_visible(queries)
        seen = queries + 1 if first is None else queries + 1 - first.clamp(min=0)
        pairs.append(int(seen.sum()))
    return torch.tensor(pairs, dtype=torch.float64)


def bound_over_ring(layout_name: str, ring_size: int) -> float:
    """Return the largest possible speed-up of a layout over the contiguous ring.

    If hops cost their visible pairs, for causal attention over one long document. Under any other
    mask the bound is the ring's own ``gain_of_balance``.
    """
    return 1.0 if layout_name == "ring" else 2 - 1 / ring_size
