"""What is known of a step on every rank when it is over, and what rank 0 learns of it and tells."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.parallel.consensus import Consensus

# What every process counted, brought to rank 0 in one small message.


def gathered(numbers: np.ndarray, consensus: Consensus) -> np.ndarray | None:
    """(ranks, n) of every rank's (n,) float64 on rank 0, None on the others. All call it; only rank 0 waits."""
    own = torch.from_numpy(numbers)
    of_all = (
        [torch.empty_like(own) for _ in range(consensus.ranks)] if consensus.rank == 0 else None
    )
    dist.gather(own, of_all, group=consensus.group)
    return None if of_all is None else torch.stack(of_all).numpy()


class StepTime(NamedTuple):
    """began: a moment, time.monotonic_ns(). seconds: from there to its end, data_seconds of them waiting for data.

    is_told: whether the console has a line for this step, as it has once a log interval.
    """

    step: int
    began: int
    seconds: float
    data_seconds: float
    is_told: bool


@dataclass(frozen=True)
class RingReport:
    """figures: for the step's line in the metrics file; lines: for the console. Empty on ranks that tell nothing."""

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __add__(self, other: "RingReport") -> "RingReport":
        return RingReport(self.figures | other.figures, self.lines + other.lines)
