"""Stragglers: the rank that takes longest for its hops, held against the mean and against its share of the work.

Waits are not counted, so that only a rank that is slow itself is slow here, not those that it holds up.
"""

import socket

import numpy as np

from megatron_ring.monitoring.ring_profile.report import RingReport, StepTime, gathered
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker


def slowest(seconds_N: np.ndarray, products_N: np.ndarray) -> tuple[int, float]:
    """The rank that is slowest, and its time over what it should be: the mean, or more where its work is more.

    Less work than the mean is no reproach: such a rank holds nobody up, and what its hops cost besides is not work.
    """
    should_be = seconds_N.mean() * np.maximum(1, products_N / products_N.mean())
    rank = int((seconds_N / should_be).argmax())
    return rank, float((seconds_N / should_be)[rank])


class Stragglers:
    """Looks once a log interval at what all ranks have done since. Building it is collective, and so is ``end``."""

    def __init__(self, place: ProgressTracker, threshold: float, consensus: Consensus):
        self._place, self._threshold, self._consensus = place, threshold, consensus
        self._nodes: list[str] = consensus.gather(socket.gethostname)
        self._seen: np.ndarray | None = None

    def end(self, time: StepTime) -> RingReport:
        """The first step, in which much is touched for the first time, is not looked at."""
        work = np.array(self._place.work, dtype=np.float64)
        if self._seen is None:
            self._seen = work
        elif time.is_told:
            since, self._seen = work - self._seen, work
            return self._report(gathered(since, self._consensus))
        return RingReport()

    def _report(self, work_N2: np.ndarray | None) -> RingReport:
        if work_N2 is None or not work_N2.any(axis=0).all():
            return RingReport()
        rank, over_mean = slowest(*work_N2.T)
        found = {"slowest_rank": rank, "slowest_over_mean": over_mean}
        return RingReport(
            found, [self._warning(rank, over_mean)] if over_mean > self._threshold else []
        )

    def _warning(self, rank: int, over_mean: float) -> str:
        return (
            f"straggler        rank {rank} ({self._nodes[rank]}) computes {over_mean:.2f} times as long in its hops as "
            f"the ranks' mean for such work; --straggler-threshold is {self._threshold}"
        )
