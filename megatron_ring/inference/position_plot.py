"""The plot of loss and bits per byte over context."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_ring.inference.positions import Curve

_LINE_STYLES = {"as-trained": "-", "joined": "--", "separated": ":", "long": "-."}


def draw_positions(curves: Sequence[Curve], picture: Path) -> None:
    """Plot the mean of each bucket at its geometric middle; raises OSError.

    A colour is a length, and a line style a kind of documents.
    """
    figure, panels = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="tight")
    lengths = sorted({curve.length for curve in curves})
    for curve in curves:
        style = {
            "color": f"C{lengths.index(curve.length)}",
            "linestyle": _LINE_STYLES[curve.documents],
            "label": f"{curve.length:,} tokens, documents {curve.documents}",
        }
        for panel, name in zip(panels, ("loss", "bits_per_byte")):
            points = [
                ((bucket.first * bucket.last) ** 0.5, getattr(bucket, name))
                for bucket in curve.buckets
                if getattr(bucket, name) is not None
            ]
            panel.plot(*zip(*points), marker="o", markersize=3, **style)
    panels[0].set(ylabel="loss (nats per token)")
    panels[1].set(ylabel="bits per byte", xlabel="context (tokens)")
    panels[1].set_xscale("log", base=2)
    panels[0].legend(frameon=False)
    for panel in panels:
        panel.grid(alpha=0.3)
    try:
        figure.savefig(picture, dpi=120)
    finally:
        plt.close(figure)
