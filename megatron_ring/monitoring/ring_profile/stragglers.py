"""Straggler detection: compare each rank's compute time in the ring with the mean of all ranks.

Waits are not counted, so a rank that is itself slow is reported, and not the ranks it delays.
"""

import socket

import numpy as np

from megatron_ring.monitoring.ring_profile.report import (
    RingReport,
    StepTime,
    gather_to_rank_zero,
)
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker


def find_slowest(seconds: np.ndarray, products: np.ndarray) -> tuple[int, float]:
    """Return the slowest rank and its compute time over its expected time. Both inputs: (ranks,).

    The expected time is the mean, scaled up for ranks with more than the mean number of query-key
    products. It is not scaled down for less work: such a rank delays no other, and a hop has costs
    that do not depend on the work.
    """
    relative_work = products / products.mean()
    expected = seconds.mean() * np.maximum(1, relative_work)
    over_expected = seconds / expected
    rank = int(over_expected.argmax())
    return rank, float(over_expected[rank])


class StragglerDetector:
    """Compares the work of all ranks once per log interval.

    The constructor and ``end`` are collective over all processes.
    """

    def __init__(self, progress: ProgressTracker, threshold: float, consensus: Consensus):
        self._progress = progress
        self._threshold = threshold
        self._consensus = consensus
        self._nodes: list[str] = consensus.gather(socket.gethostname)
        self._last_work: np.ndarray | None = None

    def end(self, time: StepTime) -> RingReport:
        """Report the slowest rank at the end of a log interval.

        The first step is excluded because it pays one-time costs.
        """
        work = np.array(self._progress.work, dtype=np.float64)
        if self._last_work is None:
            self._last_work = work
            return RingReport()
        if not time.ends_log_interval:
            return RingReport()
        in_interval = work - self._last_work
        self._last_work = work
        return self._report(gather_to_rank_zero(in_interval, self._consensus))

    def _report(self, work: np.ndarray | None) -> RingReport:
        """Report on the gathered (ranks, 2) of seconds and products; None: not rank 0."""
        if work is None or not work.any(axis=0).all():
            return RingReport()
        rank, over_mean = find_slowest(*work.T)
        metrics = {"slowest_rank": rank, "slowest_over_mean": over_mean}
        lines = [self._warning(rank, over_mean)] if over_mean > self._threshold else []
        return RingReport(metrics, lines)

    def _warning(self, rank: int, over_mean: float) -> str:
        return (
            f"straggler        rank {rank} ({self._nodes[rank]}) takes {over_mean:.2f} times the "
            "mean compute time of its ring hops, adjusted for its share of the work "
            f"(--straggler-threshold {self._threshold})"
        )
