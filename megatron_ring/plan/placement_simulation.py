"""Simulates a ring over a placement: work and critical path hop by hop, and the rows that travel.

Rows of keys can take two ways. Forwarded along the ring, a row goes as far as the last rank that
reads it, also through ranks that do not. Sent directly, it leaves its owner once for every rank
that reads it, which is never more; between nodes it is, because a forwarded row enters a node once.
Gradients of the keys take the same ways back. Without a placement every row takes R - 1 hops.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ring.context_parallel.hop_cost import exchanges_in_flight
from megatron_ring.context_parallel.sample_blocks import (
    HopCosts,
    SampleBlocks,
    compute_time,
    critical_path,
)


@dataclass(frozen=True)
class Traffic:
    """Rows that leave each rank in each hop, (hops, ranks), and the length of the sample."""

    rows_RR: np.ndarray
    seq_length: int

    @property
    def share(self) -> float:
        """The rows that leave a rank on average, over those of a ring that sends all R - 1 times.

        0 for a ring of one rank, which sends nothing.
        """
        return float(self.rows_RR.mean(1).sum()) / self._rows_of_all if self._rows_of_all else 0.0

    @property
    def share_of_most(self) -> float:
        """The same of the rank that sends the most."""
        return float(self.rows_RR.sum(0).max()) / self._rows_of_all if self._rows_of_all else 0.0

    @property
    def hops_left_out(self) -> int:
        """The number of hops after the first for which no rank sends anything."""
        return int((self.rows_RR[1:].sum(1) == 0).sum())

    @property
    def _rows_of_all(self) -> float:
        ranks = self.rows_RR.shape[1]
        return self.seq_length / ranks * (ranks - 1)


@dataclass(frozen=True)
class Simulation:
    """A ring over one sample, counted.

    Attributes:
        tiles_RR: Tiles visited in each hop by each rank, (hops, ranks).
        query_tiles_RR: Query tiles with work in each hop of each rank.
        forwarded, direct: The rows that travel either way.
    """

    costs: HopCosts
    tiles_RR: np.ndarray
    query_tiles_RR: np.ndarray
    forwarded: Traffic
    direct: Traffic

    @property
    def compute_RR(self) -> np.ndarray:
        """What each rank's work costs in each hop, without communication."""
        return compute_time(self.tiles_RR, self.query_tiles_RR, self.costs)

    @property
    def mean(self) -> float:
        """The work of a rank on average."""
        return float(self.compute_RR.sum(0).mean())

    @property
    def imbalance(self) -> float:
        """The work of the slowest rank over the mean."""
        return float(self.compute_RR.sum(0).max()) / self.mean

    def critical_path(self, with_transfers: bool = False) -> float:
        """Return the time until the last rank has finished, if rows are sent directly.

        See ``sample_blocks.critical_path``. ``with_transfers``: with the time of messages as in
        ``costs.row``, else as if it were none.
        """
        transfer_RR = self.costs.row * self.direct.rows_RR if with_transfers else None
        in_flight = exchanges_in_flight(len(self.compute_RR))
        return critical_path(self.compute_RR, transfer_RR, in_flight)


def simulate(blocks: SampleBlocks, owners: np.ndarray, costs: HopCosts) -> Simulation:
    """Count what an assignment of ``blocks`` to ``owners`` costs."""
    return Simulation(
        costs,
        *blocks.hop_work(owners),
        forwarded=Traffic(blocks.rows_forwarded(owners), blocks.seq_length),
        direct=Traffic(blocks.rows_sent_directly(owners), blocks.seq_length),
    )
