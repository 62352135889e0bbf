"""The hop timeline: a trace as a picture, one row a rank, what it computed in its rings and what it waited for."""

from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pydantic import Field

from megatron_ring.errors import DataError
from megatron_ring.untrusted import MIB, errors_as, parse_json_object, read_bytes, validate

_TRACE_BYTES = 1024 * MIB
_MOST_RANKS = 1024
_RANK = Annotated[int, Field(ge=0, lt=2**31)]
_TIMES = list[Annotated[float, Field(allow_inf_nan=False)]]

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
    if len(ranks) > _MOST_RANKS:
        raise DataError(
            f"{trace} has {len(ranks)} ranks, and a picture has room for {_MOST_RANKS}. Set --trace."
        )
    figure, rows = plt.subplots(figsize=(12, 1.5 + 0.5 * len(ranks)), layout="tight")
    for drawn, colour in _COLOURS.items():
        of_kind = [slice for slice in slices if _drawn_as(slice) == drawn]
        for rank in ranks:
            spans = [
                (slice["ts"] / 1e3, slice["dur"] / 1e3) for slice in of_kind if slice["pid"] == rank
            ]
            rows.broken_barh(spans, (ranks.index(rank) - 0.4, 0.8), color=colour, linewidth=0)
        rows.broken_barh([], (0, 0), color=colour, label=drawn)
    rows.set(xlabel="ms", yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in ranks])
    rows.invert_yaxis()
    rows.legend(frameon=False, ncols=len(_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _slices(trace: Path) -> list[dict[str, Any]]:
    with errors_as(DataError, f"{trace}, as a trace of --profile-ring-trace,", "Set --trace."):
        events = parse_json_object(read_bytes(trace, _TRACE_BYTES)).get("traceEvents")
        slices = [
            event for event in validate(events, list[dict[str, Any]]) if event.get("ph") == "X"
        ]
        for slice in slices:
            _check(slice)
        return slices


def _check(slice: dict[str, Any]) -> None:
    """Refuse a slice without what is drawn of it."""
    validate(slice.get("cat"), str)
    validate([slice.get("ts"), slice.get("dur")], _TIMES)
    validate(slice.get("pid"), _RANK)
    if slice["cat"] == "hop":
        validate(slice.get("args"), dict[str, Any])
        validate(slice["args"].get("direction"), Literal["forward", "backward"])


def _drawn_as(slice: dict[str, Any]) -> str:
    return _KINDS.get(slice["cat"]) or slice["args"]["direction"]
