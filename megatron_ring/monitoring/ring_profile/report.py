"""The records that ring profiling exchanges with the training loop, and the gather to rank 0."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.parallel.consensus import Consensus


class StepTime(NamedTuple):
    """The timing of one finished step on this rank.

    began: time.monotonic_ns() at the start. seconds: duration of the step, of which data_seconds
    were spent waiting for data. ends_log_interval: whether the console reports this step.
    """

    step: int
    began: int
    seconds: float
    data_seconds: float
    ends_log_interval: bool


@dataclass(frozen=True)
class RingReport:
    """What rank 0 reports about the ring in one step; empty on every other rank.

    metrics: keys and values for the step's line in the metrics file. lines: for the console.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __add__(self, other: "RingReport") -> "RingReport":
        return RingReport(self.metrics | other.metrics, self.lines + other.lines)


def gather_to_rank_zero(values: np.ndarray, consensus: Consensus) -> np.ndarray | None:
    """Gather each rank's (n,) float64 array into (ranks, n) on rank 0; returns None elsewhere.

    Collective over all processes. Only rank 0 blocks.
    """
    own = torch.from_numpy(values)
    gathered = None
    if consensus.rank == 0:
        gathered = [torch.empty_like(own) for _ in range(consensus.ranks)]
    dist.gather(own, gathered, group=consensus.group)
    return None if gathered is None else torch.stack(gathered).numpy()
