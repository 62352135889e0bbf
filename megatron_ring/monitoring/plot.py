"""The loss of a run as a picture, drawn from its metrics file; with --profile-ring, what it waited in its rings too."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_ring.errors import DataError
from megatron_ring.monitoring.metrics import Thinned
from megatron_ring.monitoring.metrics_file import records
from megatron_ring.monitoring.outputs import reason

Record = dict[str, Any]
Records = list[Record]

# Points of a curve, and of what is kept of a file of any length.
_POINTS = 4096
_DRAWN = "step", "loss", "tokens_per_second"


def draw_loss(metrics_file: Path, picture: Path) -> Path:
    """Draw training loss, held-out bits per byte and tokens per second over steps into ``picture``.

    Returns ``picture``; raises DataError without steps, OSError if it cannot be written.

    Below them, where the run was profiled, the exposed wait of each hop of the ring. Of a run of
    more than _POINTS steps every second, fourth, ... is drawn, as the axis says. Lines that are no
    records are passed over.
    """
    steps, validations = Thinned[Record](_POINTS), Thinned[Record](_POINTS)
    try:
        for record in records(metrics_file):
            if "loss" in record:
                steps.add({name: record.get(name) for name in _DRAWN} | {"waits": _waits(record)})
            elif "validation_loss" in record:
                validations.add(record)
    except OSError as error:
        raise DataError(f"{metrics_file}: {reason(error)}. Set --metrics-file.") from error
    if not steps.values:
        raise DataError(f"{metrics_file} holds no training step. Set --metrics-file.")
    profiled = [step for step in steps.values if step["waits"]]
    heights = [3, 1, 2] if profiled else [3, 1]
    size = 8, 1.5 * sum(heights)
    figure, axes = plt.subplots(
        len(heights), 1, figsize=size, sharex=True, height_ratios=heights, layout="tight"
    )
    _draw_losses(axes[0], steps.values, validations.values)
    speeds = [(step["step"], step["tokens_per_second"]) for step in steps.values]
    axes[1].plot(*zip(*speeds), color="tab:green")
    axes[1].set(ylabel="tokens/s", ylim=0)
    if profiled:
        _draw_waits(axes[2], profiled)
    axes[-1].set(xlabel="step" if steps.stride == 1 else f"step (one of {steps.stride} is drawn)")
    for each in axes:
        each.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(picture, dpi=120)
    finally:
        plt.close(figure)
    return picture


def _waits(record: Record) -> dict[str, float]:
    """Milliseconds that each hop of a profiled step has waited, by direction and number."""
    hops = record.get("ring_hops", [])
    return {f"{hop['direction']} {hop['hop']}": hop["wait_seconds"] * 1e3 for hop in hops}


def _draw_losses(axes: Axes, steps: Records, validations: Records) -> None:
    axes.plot(
        [r["step"] for r in steps],
        [r["loss"] for r in steps],
        label="training loss (nats per token)",
    )
    if validations:
        bits = [r["validation_bits_per_byte"] for r in validations]
        axes.plot(
            [r["step"] for r in validations], bits, "o-", label="held-out text (bits per byte)"
        )
    axes.legend(frameon=False)


def _draw_waits(axes: Axes, profiled: Records) -> None:
    """A line for each direction and hop: milliseconds a step, the mean over ranks."""
    for name in dict.fromkeys(name for record in profiled for name in record["waits"]):
        of_hop = [record for record in profiled if name in record["waits"]]
        line = [(record["step"], record["waits"][name]) for record in of_hop]
        axes.plot(*zip(*line), label=name)
    axes.set(ylabel="exposed wait (ms)", ylim=0)
    axes.legend(frameon=False, ncols=2, fontsize="small")
