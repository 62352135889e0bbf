"""The sums of all ranks as the figures of a step: shares of its time, and what each hop costs.

The four shares do not overlap; what they leave is the rest of the model, and communication outside of the ring.
"""

from typing import Any

import numpy as np

from megatron_ring.monitoring.ring_profile.sums import StepSums
from megatron_ring.parallel.progress import Direction

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


def in_words(steps: list[dict[str, Any]]) -> str:
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
