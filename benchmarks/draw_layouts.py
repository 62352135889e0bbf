"""Draw which rank owns which token and the work of each rank per hop, computed from the layouts.

python -m benchmarks.draw_layouts --output docs/layouts.svg
python -m benchmarks.draw_layouts --documents 23 5 1 29 6 --output docs/packed.svg
"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes

from benchmarks.document_packs import starts_of
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.errors import reporting_errors
from megatron_ring.plan.ring_timeline import visible_pairs_per_hop

_RANK_COLORS = (
    "#4c72b0",
    "#dd8452",
    "#55a868",
    "#c44e52",
    "#8172b3",
    "#937860",
    "#da8bc3",
    "#8c8c8c",
)
_BOUNDARY_COLOR = "#222222"
_DOCUMENT_COLORS = ("#d9d9d9", "#efefef")


def main(
    output: Path = Path("docs/layouts.svg"),
    ring_size: int = 4,
    tokens: int = 32,
    documents: tuple[int, ...] = (),
) -> None:
    """Draw the ring, striped and zigzag layouts and each rank's work per hop under a causal mask.

    Args:
        output: The picture to write; its suffix selects the format (svg, png, pdf).
        ring_size: Ranks of the ring, at most 8.
        tokens: Tokens of the sample, a multiple of 2 x ring size. Ignored with --documents.
        documents: Lengths of the documents packed into the sample; none: a single document.
    """
    tokens = sum(documents) or tokens
    layouts = [Layout(name, tokens, ring_size) for name in ("ring", "striped", "zigzag")]
    mask = Mask(document_starts=starts_of(documents, tokens) if documents else ())
    max_work = max(visible_pairs_per_hop(layout, mask).work_RR.max().item() for layout in layouts)
    figure, rows = plt.subplots(
        len(layouts), 2, figsize=(10, 4.2), width_ratios=[2, 1], layout="tight", squeeze=False
    )
    for layout, (owners, work) in zip(layouts, rows):
        _draw_owners(owners, layout)
        _draw_documents(owners, [*mask.document_starts, tokens])
        _draw_work(work, layout, mask, max_work)
    output.parent.mkdir(parents=True, exist_ok=True)
    # No date and no random ids, so that the same layouts give the same file.
    plt.rcParams["svg.hashsalt"] = "layouts"
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
    print(f"drew {output}")


def _draw_owners(axes: Axes, layout: Layout) -> None:
    """Draw a box per token in the color of the ring rank that owns it."""
    fontsize = min(8, 400 / layout.seq_length)  # a digit that fits into its box
    for ring_rank in range(layout.ring_size):
        for position in layout.positions(ring_rank).tolist():
            axes.add_patch(plt.Rectangle((position, 0), 0.92, 1, color=_RANK_COLORS[ring_rank]))
            axes.text(
                position + 0.46,
                0.5,
                str(ring_rank),
                ha="center",
                va="center",
                color="white",
                fontsize=fontsize,
            )
    axes.set(
        xlim=(0, layout.seq_length),
        ylim=(0, 1),
        yticks=[],
        xticks=[],
        xlabel="position of the token",
    )
    axes.set_title(f"{layout.name}: which ring rank owns a token", fontsize=10)
    axes.set_frame_on(False)


def _draw_documents(axes: Axes, bounds: list[int]) -> None:
    """Draw a box with its length below the tokens of each document, and lines between documents."""
    for number, (start, stop) in enumerate(pairwise(bounds)):
        color = _DOCUMENT_COLORS[number % 2]
        axes.add_patch(plt.Rectangle((start, -0.3), stop - start - 0.08, 0.24, color=color))
        axes.text(
            (start + stop) / 2 - 0.04,
            -0.18,
            str(stop - start),
            ha="center",
            va="center",
            fontsize=7,
        )
    for boundary in bounds[1:-1]:
        axes.plot([boundary - 0.04] * 2, [-0.3, 1.0], color=_BOUNDARY_COLOR, linewidth=1.3)
    if len(bounds) > 1:
        axes.set(ylim=(-0.3, 1), xlabel="position of the token; below each document, its length")


def _draw_work(axes: Axes, layout: Layout, mask: Mask, max_work: float) -> None:
    """Draw a bar of visible pairs per rank and hop; the space above a bar is time spent waiting."""
    timeline = visible_pairs_per_hop(layout, mask)
    width = 0.9 / layout.ring_size
    for ring_rank in range(layout.ring_size):
        left = [hop + ring_rank * width for hop in range(layout.ring_size)]
        heights = timeline.work_RR[:, ring_rank].tolist()
        axes.bar(left, heights, width, align="edge", color=_RANK_COLORS[ring_rank])
    axes.set(ylim=(0, max_work), yticks=[], xticks=[h + 0.45 for h in range(layout.ring_size)])
    axes.set_xticklabels([f"hop {hop}" for hop in range(layout.ring_size)], fontsize=8)
    slowest = f": slowest {timeline.imbalance:.2f} x mean" if mask.document_starts else ""
    axes.set_title(f"work of each rank{slowest}", fontsize=10)


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
