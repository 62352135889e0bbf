"""Plot a run's loss from its metrics file, and its ring hops from a trace.

python tools/plot_metrics.py --metrics-file runs/tiny-cpu/metrics.jsonl --output loss.png
python tools/plot_metrics.py --metrics-file metrics.jsonl --output loss.png --trace trace.json
"""

from pathlib import Path

import megatron_ring.parallel.interrupt_hook  # noqa: F401 (before slow imports)

# isort: split

import tyro

from megatron_ring.errors import DataError, reporting_errors
from megatron_ring.monitoring.outputs import PNG, picture_problem
from megatron_ring.monitoring.plot import draw_loss
from megatron_ring.monitoring.ring_profile.timeline import draw_timeline

_PICTURE_BEGINNINGS = (
    PNG,
    b"<?xml",
    b"<svg",
    b"%PDF",
    b"%!PS",
    b"\xff\xd8\xff",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
)


def main(metrics_file: Path, output: Path, trace: Path | None = None) -> None:
    """Plot training loss, held-out bits per byte, throughput and, if profiled, the hops' waits.

    Args:
        metrics_file: The file that pretrain_gpt.py wrote with --metrics-file.
        output: The picture to write, in the format of its suffix (png, svg, pdf). An existing file
            is replaced only if it is a picture.
        trace: The file that pretrain_gpt.py wrote with --profile-ring-trace. Its hop timeline is
            drawn into a second picture, named like the output with "-hops" before the suffix.
    """
    timeline = output.with_stem(f"{output.stem}-hops") if trace and output.name else None
    for picture in filter(None, (output, timeline)):
        if problem := picture_problem(picture, _PICTURE_BEGINNINGS):
            raise DataError(f"output {picture} {problem}. Set --output to another file.")
    try:
        print(f"drew {draw_loss(metrics_file, output)}")
        if trace and timeline:
            draw_timeline(trace, timeline)
            print(f"drew {timeline}")
    except (OSError, ValueError) as error:
        raise DataError(f"output {output} cannot be written: {error}. Set --output.") from error


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
