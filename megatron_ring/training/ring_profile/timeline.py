"""The hop timeline: a trace as a picture, one row a rank, what it computed in its rings and what it waited for."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_ring.errors import DataError

# What is drawn, in this order, so that waits lie over the hops that they are part of.
_COLOURS = {
    "forward": "tab:blue",
    "backward": "tab:cyan",
    "exposed wait": "tab:red",
    "data": "tab:olive",
    "optimizer": "tab:gray",
}
_KINDS = {"wait": "exposed wait", "data": "data", "optimizer": "optimizer"}


def draw_timeline(trace: Path, picture: Path) -> None:
    """Draw what --profile-ring-trace wrote; raises DataError where that is no such trace."""
    slices = [slice for slice in _slices(trace) if slice["cat"] in ("hop", *_KINDS)]
    if not slices:
        raise DataError(f"{trace} holds no hop of a ring. Set --trace.")
    ranks = sorted({slice["pid"] for slice in slices})
    figure, rows = plt.subplots(figsize=(12, 1.5 + 0.5 * len(ranks)), layout="tight")
    for drawn, colour in _COLOURS.items():
        of_kind = [slice for slice in slices if _drawn_as(slice) == drawn]
        for rank in ranks:
            spans = [(slice["ts"] / 1e3, slice["dur"] / 1e3) for slice in of_kind if slice["pid"] == rank]
            rows.broken_barh(spans, (ranks.index(rank) - 0.4, 0.8), color=colour, linewidth=0)
        rows.broken_barh([], (0, 0), color=colour, label=drawn)
    rows.set(xlabel="ms", yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in ranks])
    rows.invert_yaxis()
    rows.legend(frameon=False, ncols=len(_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _slices(trace: Path) -> list[dict[str, Any]]:
    try:
        events = json.loads(trace.read_text())["traceEvents"]
        return [event for event in events if event["ph"] == "X"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{trace} is no trace of --profile-ring-trace: {error}. Set --trace.") from error


def _drawn_as(slice: dict[str, Any]) -> str:
    return _KINDS.get(slice["cat"]) or slice["args"]["direction"]
