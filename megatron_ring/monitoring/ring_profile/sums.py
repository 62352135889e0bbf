"""A process's log of a step (parallel/ring_log.py) as sums: what each hop computed, waited and sent.

Between two rows a process does one thing, which the first of them says. So every stretch of time is counted once, and
in a pass of the ring what is not waiting is computing.
"""

from dataclasses import dataclass

import numpy as np

from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event

# After these a process is outside of the ring's passes, or not at work there.
_NOT_COMPUTING = Event.WAITING, Event.LEFT, Event.OPTIMIZING, Event.OPTIMIZED


@dataclass(frozen=True)
class StepSums:
    """compute_2R, wait_2R, bytes_2R: seconds and bytes sent, by direction and hop; float64.

    optimizer_seconds: in DeepSpeed's step.
    """

    compute_2R: np.ndarray
    wait_2R: np.ndarray
    bytes_2R: np.ndarray
    optimizer_seconds: float


def sums(rows: np.ndarray, ring_size: int) -> StepSums:
    """Of a log's rows, (rows, 4) int64. A pass begins with its first hop: what it prepares belongs to that."""
    moment, event, a, b = rows.T
    seconds = np.diff(moment, append=moment[-1:]) / 1e9
    direction = _latest(event == Event.ENTERED, b)
    begins_hop = np.isin(event, (Event.ENTERED, Event.HOP))
    hop = _latest(begins_hop, np.where(event == Event.HOP, a, 1)) - 1

    def by_hop(chosen: np.ndarray, amounts: np.ndarray) -> np.ndarray:
        cells = direction[chosen] * ring_size + hop[chosen]
        return np.bincount(cells, amounts[chosen], len(Direction) * ring_size).reshape(
            -1, ring_size
        )

    return StepSums(
        compute_2R=by_hop(~np.isin(event, _NOT_COMPUTING), seconds),
        wait_2R=by_hop(event == Event.WAITING, seconds),
        bytes_2R=by_hop(event == Event.SENT, a),
        optimizer_seconds=float(seconds[event == Event.OPTIMIZING].sum()),
    )


def _latest(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each row, the value of the last chosen one up to it; before the first, that of row 0."""
    at = np.maximum.accumulate(np.where(chosen, np.arange(len(chosen)), 0))
    return values[at]
