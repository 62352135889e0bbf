"""The loss of a run as a picture, drawn from its metrics file; with --profile-ring, what it waited in its rings too."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_ring.errors import DataError

Records = list[dict[str, Any]]


def draw_loss(metrics_file: Path, picture: Path) -> None:
    """Draw training loss, held-out bits per byte and tokens per second over steps; raises DataError without steps.

    Below them, where the run was profiled, the exposed wait of each hop of the ring.
    """
    records = _records(metrics_file)
    steps = [record for record in records if "loss" in record]
    profiled = [record for record in steps if record.get("ring_hops")]
    if not steps:
        raise DataError(f"{metrics_file} holds no training step. Set --metrics-file.")
    heights = [3, 1, 2] if profiled else [3, 1]
    size = 8, 1.5 * sum(heights)
    figure, axes = plt.subplots(len(heights), 1, figsize=size, sharex=True, height_ratios=heights, layout="tight")
    _draw_losses(axes[0], steps, [record for record in records if "validation_loss" in record])
    axes[1].plot([r["step"] for r in steps], [r["tokens_per_second"] for r in steps], color="tab:green")
    axes[1].set(ylabel="tokens/s", ylim=0)
    if profiled:
        _draw_waits(axes[2], profiled)
    axes[-1].set(xlabel="step")
    for each in axes:
        each.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _records(metrics_file: Path) -> Records:
    try:
        return [json.loads(line) for line in metrics_file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{metrics_file} is not a metrics file: {error}. Set --metrics-file.") from error


def _draw_losses(axes: Axes, steps: Records, validations: Records) -> None:
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training loss (nats per token)")
    if validations:
        bits = [r["validation_bits_per_byte"] for r in validations]
        axes.plot([r["step"] for r in validations], bits, "o-", label="held-out text (bits per byte)")
    axes.legend(frameon=False)


def _draw_waits(axes: Axes, profiled: Records) -> None:
    """A line for each direction and hop: milliseconds a step, the mean over ranks."""
    waits: dict[str, list[tuple[int, float]]] = {}
    for record in profiled:
        for hop in record["ring_hops"]:
            line = waits.setdefault(f"{hop['direction']} {hop['hop']}", [])
            line.append((record["step"], hop["wait_seconds"] * 1e3))
    for name, line in waits.items():
        axes.plot(*zip(*line), label=name)
    axes.set(ylabel="exposed wait (ms)", ylim=0)
    axes.legend(frameon=False, ncols=2, fontsize="small")
