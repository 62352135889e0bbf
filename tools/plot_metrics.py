"""Draw the loss of a run from its metrics file.

python tools/plot_metrics.py --metrics-file runs/tiny-cpu/metrics.jsonl --output loss.png
"""

from pathlib import Path

import tyro

from megatron_ring.errors import speaking_errors
from megatron_ring.training.plot import draw_loss


def main(metrics_file: Path, output: Path) -> None:
    """Draw training loss, held-out bits per byte and speed over steps.

    Args:
        metrics_file: What pretrain_gpt.py wrote with --metrics-file.
        output: The picture to write; its ending says which kind (png, svg, pdf).
    """
    draw_loss(metrics_file, output)
    print(f"drew {output}")


if __name__ == "__main__":
    with speaking_errors():
        tyro.cli(main)
