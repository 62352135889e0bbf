"""Statistics of one step's ring hops: compute, wait and bytes a hop, and shares of the step's time.

Each rank reduces its event log (parallel/ring_log.py) to sums; rank 0 averages the sums of all
ranks into the step's metrics. Between two rows of the log a process does exactly one thing, named
by the first of them. So every stretch of time is counted once, and within a pass of the ring, time
that is not waiting is computing. The four shares do not overlap; the remainder of a step is the
rest of the model and communication outside the ring.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ring.errors import counted
from megatron_ring.parallel.progress import Direction
from megatron_ring.parallel.ring_log import Event

SHARES = ("attention_share", "exposed_communication_share", "data_share", "optimizer_share")

# After these events a process is outside the ring's passes, or inside one but not computing.
_NOT_COMPUTING = (Event.WAITING, Event.LEFT, Event.OPTIMIZING, Event.OPTIMIZED)


@dataclass(frozen=True)
class StepSums:
    """One rank's sums over a step.

    compute_2R, wait_2R: seconds by direction and hop. bytes_2R: bytes sent by direction and hop.
    All three are float64. optimizer_seconds: time in DeepSpeed's optimizer step.
    """

    compute_2R: np.ndarray
    wait_2R: np.ndarray
    bytes_2R: np.ndarray
    optimizer_seconds: float


def sum_log(rows: np.ndarray, ring_size: int) -> StepSums:
    """Reduce a step's log, (rows, 4) int64, to sums.

    Preparation between entering a pass and its first hop counts towards that hop.
    """
    moment, event, a, b = rows.T
    seconds = np.diff(moment, append=moment[-1:]) / 1e9
    direction = _forward_fill(event == Event.ENTERED, b)
    begins_hop = np.isin(event, (Event.ENTERED, Event.HOP))
    hop = _forward_fill(begins_hop, np.where(event == Event.HOP, a, 1)) - 1
    cell = direction * ring_size + hop

    def by_hop(selected: np.ndarray, amounts: np.ndarray) -> np.ndarray:
        cells = len(Direction) * ring_size
        totals = np.bincount(cell[selected], amounts[selected], cells)
        return totals.reshape(-1, ring_size)

    return StepSums(
        compute_2R=by_hop(~np.isin(event, _NOT_COMPUTING), seconds),
        wait_2R=by_hop(event == Event.WAITING, seconds),
        bytes_2R=by_hop(event == Event.SENT, a),
        optimizer_seconds=float(seconds[event == Event.OPTIMIZING].sum()),
    )


def _forward_fill(selected: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each row the value of the last selected row up to it, or row 0's before any."""
    at = np.maximum.accumulate(np.where(selected, np.arange(len(selected)), 0))
    return values[at]


def pack_sums(sums: StepSums, missed_rows: int, seconds: float, data_seconds: float) -> np.ndarray:
    """Pack a rank's sums of a step of ``seconds`` into one float64 vector of length 5 + 6R.

    The order is: the four shares, the log rows that did not fit, then compute, wait and bytes.
    """
    spent = [sums.compute_2R.sum(), sums.wait_2R.sum(), data_seconds, sums.optimizer_seconds]
    hops_32R = np.stack([sums.compute_2R, sums.wait_2R, sums.bytes_2R])
    return np.concatenate([np.array(spent) / seconds, [missed_rows], hops_32R.ravel()])


def step_metrics(packed: np.ndarray, rings: list[list[int]]) -> dict[str, Any]:
    """Average the packed sums of all ranks, (ranks, 5 + 6R), into the step's metrics.

    rings: the global ranks of each ring.
    """
    ranks = len(packed)
    shares, missed, hops = np.split(packed, [len(SHARES), len(SHARES) + 1], axis=1)
    # The leading axis of each is the global rank.
    by_quantity = hops.reshape(ranks, 3, len(Direction), -1).swapaxes(0, 1)
    compute, wait, sent = by_quantity
    metrics: dict[str, Any] = dict(zip(SHARES, shares.mean(axis=0).tolist()))
    if missed.any():
        metrics["missed_rows"] = int(missed.sum())
    metrics["ring_hops"] = [
        {
            "direction": Direction(direction).name.lower(),
            "hop": int(hop) + 1,
            "compute_seconds": float(compute[:, direction, hop].mean()),
            "wait_seconds": float(wait[:, direction, hop].mean()),
            "bytes": int(sent[:, direction, hop].mean()),
            "imbalance": _imbalance(compute[:, direction, hop], rings),
        }
        for direction, hop in np.argwhere(compute.any(axis=0))
    ]
    return metrics


def _imbalance(seconds: np.ndarray, rings: list[list[int]]) -> float:
    """Return the slowest rank's time over its ring's mean, for the least balanced ring.

    The comparison stays within a ring because only ranks of one ring wait for each other.
    """
    ratios = [seconds[ring].max() / seconds[ring].mean() for ring in rings if seconds[ring].any()]
    return float(max(ratios))


def summary_line(steps: list[dict[str, Any]]) -> str:
    """Format the console line for the mean of several steps' metrics."""
    shares = ", ".join(f"{_label(name)} {_mean(steps, name):.1%}" for name in SHARES)
    missed = sum(step.get("missed_rows", 0) for step in steps)
    truncated = f"; incomplete: {counted(missed, 'row')} did not fit into the log" if missed else ""
    return f"ring             {shares}{_least_balanced_hop(steps)}{truncated}"


def _label(share: str) -> str:
    return share.removesuffix("_share").replace("_", " ")


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def _least_balanced_hop(steps: list[dict[str, Any]]) -> str:
    imbalances: dict[str, list[float]] = {}
    for step in steps:
        for hop in step["ring_hops"]:
            name = f"{hop['direction']} hop {hop['hop']}"
            imbalances.setdefault(name, []).append(hop["imbalance"])
    means = {name: sum(values) / len(values) for name, values in imbalances.items()}
    worst = max(means, key=means.get, default=None)
    if worst is None or means[worst] <= 1:
        return ""
    return f"; least balanced: {worst}, {means[worst]:.2f}"
