"""The plot of a run: loss and throughput from its metrics file, and its hops' waits if profiled."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_ring.errors import DataError
from megatron_ring.monitoring.metrics import EvenlySampled
from megatron_ring.monitoring.metrics_file import records
from megatron_ring.monitoring.outputs import describe_error

Record = dict[str, Any]
Records = list[Record]

# The points of a curve, and of what is held in memory of a file of any length.
_MAX_POINTS = 4096
_PLOTTED_KEYS = ("step", "loss", "tokens_per_second")


def draw_loss(metrics_file: Path, picture: Path) -> Path:
    """Plot training loss, held-out bits per byte and tokens per second over steps.

    If the run was profiled, the exposed wait of each hop of the ring is plotted below. Of a run
    with more than _MAX_POINTS steps every second, fourth, ... is plotted, as the axis states.
    Lines of the file that are not records are skipped.

    Returns ``picture``. Raises DataError if the file has no training step, OSError if the picture
    cannot be written.
    """
    steps = EvenlySampled[Record](_MAX_POINTS)
    validations = EvenlySampled[Record](_MAX_POINTS)
    try:
        for record in records(metrics_file):
            if "loss" in record:
                plotted = {name: record.get(name) for name in _PLOTTED_KEYS}
                steps.add(plotted | {"waits": _waits(record)})
            elif "validation_loss" in record:
                validations.add(record)
    except OSError as error:
        raise DataError(f"{metrics_file}: {describe_error(error)}. Set --metrics-file.") from error
    if not steps.values:
        raise DataError(f"{metrics_file} has no training step. Set --metrics-file.")
    profiled = [step for step in steps.values if step["waits"]]
    heights = [3, 1, 2] if profiled else [3, 1]
    size = (8, 1.5 * sum(heights))
    figure, axes = plt.subplots(
        len(heights), 1, figsize=size, sharex=True, height_ratios=heights, layout="tight"
    )
    _draw_losses(axes[0], steps.values, validations.values)
    speeds = [(step["step"], step["tokens_per_second"]) for step in steps.values]
    axes[1].plot(*zip(*speeds), color="tab:green")
    axes[1].set(ylabel="tokens/s", ylim=0)
    if profiled:
        _draw_waits(axes[2], profiled)
    is_complete = steps.stride == 1
    axes[-1].set(xlabel="step" if is_complete else f"step (one of {steps.stride} is drawn)")
    for panel in axes:
        panel.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(picture, dpi=120)
    finally:
        plt.close(figure)
    return picture


def _waits(record: Record) -> dict[str, float]:
    """Return the milliseconds that each hop of a profiled step waited, by direction and number."""
    hops = record.get("ring_hops", [])
    return {f"{hop['direction']} {hop['hop']}": hop["wait_seconds"] * 1e3 for hop in hops}


def _draw_losses(axes: Axes, steps: Records, validations: Records) -> None:
    axes.plot(
        [record["step"] for record in steps],
        [record["loss"] for record in steps],
        label="training loss (nats per token)",
    )
    if validations:
        axes.plot(
            [record["step"] for record in validations],
            [record["validation_bits_per_byte"] for record in validations],
            "o-",
            label="held-out text (bits per byte)",
        )
    axes.legend(frameon=False)


def _draw_waits(axes: Axes, profiled: Records) -> None:
    """Plot one line per direction and hop: milliseconds a step, averaged over ranks."""
    names = dict.fromkeys(name for record in profiled for name in record["waits"])
    for name in names:
        points = [
            (record["step"], record["waits"][name])
            for record in profiled
            if name in record["waits"]
        ]
        axes.plot(*zip(*points), label=name)
    axes.set(ylabel="exposed wait (ms)", ylim=0)
    axes.legend(frameon=False, ncols=2, fontsize="small")
