"""Draw the loss of a run from its metrics file, and its hops from the trace of its ring.

python tools/plot_metrics.py --metrics-file runs/tiny-cpu/metrics.jsonl --output loss.png
python tools/plot_metrics.py --metrics-file runs/tiny-cpu/metrics.jsonl --output loss.png --trace trace.json
"""

from pathlib import Path

import tyro

from megatron_ring.errors import DataError, reporting_errors
from megatron_ring.monitoring.outputs import PNG, picture_problem
from megatron_ring.monitoring.plot import draw_loss
from megatron_ring.monitoring.ring_profile.timeline import draw_timeline

_PICTURES = (PNG, b"<?xml", b"<svg", b"%PDF", b"%!PS", b"\xff\xd8\xff", b"RIFF", b"II*\0", b"MM\0*")


def main(metrics_file: Path, output: Path, trace: Path | None = None) -> None:
    """Draw training loss, held-out bits per byte and speed over steps, and what hops waited where that was profiled.

    Args:
        metrics_file: What pretrain_gpt.py wrote with --metrics-file.
        output: The picture to write; its ending says which kind (png, svg, pdf). An existing file is
            replaced only if it is a picture.
        trace: What it wrote with --profile-ring-trace: drawn beside the output, as its name with "-hops" behind.
    """
    hops = output.with_stem(f"{output.stem}-hops") if trace and output.name else None
    for picture in filter(None, (output, hops)):
        if why := picture_problem(picture, _PICTURES):
            raise DataError(f"output {picture} {why}. Set --output to another file.")
    try:
        print(f"drew {draw_loss(metrics_file, output)}")
        if trace and hops:
            draw_timeline(trace, hops)
            print(f"drew {hops}")
    except (OSError, ValueError) as error:
        raise DataError(f"output {output} cannot be written: {error}. Set --output.") from error


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
