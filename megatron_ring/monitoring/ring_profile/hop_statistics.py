"""The sums of all ranks as the figures of a step: shares of its time, and what each hop costs.

The four shares do not overlap; what they leave is the rest of the model, and communication outside of the ring.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event

# A process's log of a step (parallel/ring_log.py) as sums: what each hop computed, waited and sent.
#
# Between two rows a process does one thing, which the first of them says. So every stretch of time is counted once, and
# in a pass of the ring what is not waiting is computing.
#

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


SHARES = ("attention_share", "exposed_communication_share", "data_share", "optimizer_share")


def as_numbers(own: StepSums, missed: int, seconds: float, data_seconds: float) -> np.ndarray:
    """(5 + 6 x R,) float64: what a rank tells of a step that took it ``seconds``: shares, rows missed, hops."""
    spent = own.compute_2R.sum(), own.wait_2R.sum(), data_seconds, own.optimizer_seconds
    hops_32R = np.stack([own.compute_2R, own.wait_2R, own.bytes_2R])
    return np.concatenate([np.array(spent) / seconds, [missed], hops_32R.ravel()])


def figures(of_ranks: np.ndarray, rings: list[list[int]]) -> dict[str, Any]:
    """What the metrics file has of a step, from the numbers of all ranks. ``rings``: the global ranks of each."""
    shares, missed, hops = np.split(of_ranks, [len(SHARES), len(SHARES) + 1], axis=1)
    compute_N2R, wait_N2R, bytes_N2R = hops.reshape(len(of_ranks), 3, len(Direction), -1).swapaxes(
        0, 1
    )
    told = dict(zip(SHARES, shares.mean(axis=0).tolist()))
    if missed.any():
        told["missed_rows"] = int(missed.sum())
    return told | {
        "ring_hops": [
            {
                "direction": Direction(direction).name.lower(),
                "hop": int(hop) + 1,
                "compute_seconds": float(compute_N2R[:, direction, hop].mean()),
                "wait_seconds": float(wait_N2R[:, direction, hop].mean()),
                "bytes": int(bytes_N2R[:, direction, hop].mean()),
                "imbalance": _imbalance(compute_N2R[:, direction, hop], rings),
            }
            for direction, hop in np.argwhere(compute_N2R.any(axis=0))
        ]
    }


def _imbalance(seconds_N: np.ndarray, rings: list[list[int]]) -> float:
    """The slowest rank over the mean of its ring, in the worst ring: only ranks of one ring wait for each other."""
    slowest = (
        seconds_N[ring].max() / seconds_N[ring].mean() for ring in rings if seconds_N[ring].any()
    )
    return float(max(slowest))


def summary_line(steps: list[dict[str, Any]]) -> str:
    """The line on the console: the mean of some steps' figures."""
    shares = (
        f"{name.removesuffix('_share').replace('_', ' ')} {_mean(steps, name):.1%}"
        for name in SHARES
    )
    missed = sum(step.get("missed_rows", 0) for step in steps)
    lost = f"; too little, for {missed} rows did not fit into the log" if missed else ""
    return f"ring             {', '.join(shares)}{_least_even_hop(steps)}{lost}"


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def _least_even_hop(steps: list[dict[str, Any]]) -> str:
    uneven: dict[str, list[float]] = {}
    for step in steps:
        for hop in step["ring_hops"]:
            uneven.setdefault(f"{hop['direction']} hop {hop['hop']}", []).append(hop["imbalance"])
    means = {name: sum(found) / len(found) for name, found in uneven.items()}
    worst = max(means, key=means.get, default=None)
    return f"; least even: {worst}, {means[worst]:.2f}" if worst and means[worst] > 1 else ""
