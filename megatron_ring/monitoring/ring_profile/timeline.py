"""The hop timeline: a picture of a ring trace, one row a rank, with its hops and exposed waits."""

from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pydantic import Field

from megatron_ring.errors import DataError
from megatron_ring.untrusted import MIB, errors_as, parse_json_object, read_bytes, validate

_TRACE_BYTES = 1024 * MIB
_MAX_RANKS = 1024
_RANK = Annotated[int, Field(ge=0, lt=2**31)]
_TIMES = list[Annotated[float, Field(allow_inf_nan=False)]]

# In drawing order: waits are drawn over the hops that contain them.
_COLOURS = {
    "forward": "tab:blue",
    "backward": "tab:cyan",
    "exposed wait": "tab:red",
    "data": "tab:olive",
    "optimizer": "tab:gray",
}
# Category of a slice -> legend entry; a hop's entry is its direction.
_LABELS = {"wait": "exposed wait", "data": "data", "optimizer": "optimizer"}


def draw_timeline(trace: Path, picture: Path) -> None:
    """Draw the trace that --profile-ring-trace wrote; raises DataError if the file is not one."""
    slices = [slice for slice in _read_slices(trace) if slice["cat"] in ("hop", *_LABELS)]
    if not slices:
        raise DataError(f"{trace} has no ring hop. Set --trace.")
    ranks = sorted({slice["pid"] for slice in slices})
    if len(ranks) > _MAX_RANKS:
        raise DataError(
            f"{trace} has {len(ranks)} ranks; at most {_MAX_RANKS} can be drawn. Set --trace."
        )
    figure, axes = plt.subplots(figsize=(12, 1.5 + 0.5 * len(ranks)), layout="tight")
    for label, colour in _COLOURS.items():
        labelled = [slice for slice in slices if _label(slice) == label]
        for row, rank in enumerate(ranks):
            spans = [
                (slice["ts"] / 1e3, slice["dur"] / 1e3)
                for slice in labelled
                if slice["pid"] == rank
            ]
            axes.broken_barh(spans, (row - 0.4, 0.8), color=colour, linewidth=0)
        axes.broken_barh([], (0, 0), color=colour, label=label)
    axes.set(xlabel="ms", yticks=range(len(ranks)), yticklabels=[f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=len(_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _read_slices(trace: Path) -> list[dict[str, Any]]:
    with errors_as(DataError, f"{trace}, as a trace of --profile-ring-trace,", "Set --trace."):
        events = parse_json_object(read_bytes(trace, _TRACE_BYTES)).get("traceEvents")
        slices = [
            event for event in validate(events, list[dict[str, Any]]) if event.get("ph") == "X"
        ]
        for slice in slices:
            _check(slice)
        return slices


def _check(slice: dict[str, Any]) -> None:
    """Validate the fields of a slice that the drawing uses."""
    validate(slice.get("cat"), str)
    validate([slice.get("ts"), slice.get("dur")], _TIMES)
    validate(slice.get("pid"), _RANK)
    if slice["cat"] == "hop":
        validate(slice.get("args"), dict[str, Any])
        validate(slice["args"].get("direction"), Literal["forward", "backward"])


def _label(slice: dict[str, Any]) -> str:
    return _LABELS.get(slice["cat"]) or slice["args"]["direction"]
