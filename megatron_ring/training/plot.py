"""The loss of a run as a picture, drawn from its metrics file."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_ring.errors import DataError


def draw_loss(metrics_file: Path, picture: Path) -> None:
    """Draw training loss, held-out bits per byte and tokens per second over steps; raises DataError without steps."""
    try:
        records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{metrics_file} is not a metrics file: {error}. Set --metrics-file.") from error
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    if not steps:
        raise DataError(f"{metrics_file} holds no training step. Set --metrics-file.")
    figure, (losses, speed) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="tight")
    losses.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training loss (nats per token)")
    if validations:
        bits = [r["validation_bits_per_byte"] for r in validations]
        losses.plot([r["step"] for r in validations], bits, "o-", label="held-out text (bits per byte)")
    losses.legend(frameon=False)
    losses.grid(alpha=0.3)
    speed.plot([r["step"] for r in steps], [r["tokens_per_second"] for r in steps], color="tab:green")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=0)
    speed.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
