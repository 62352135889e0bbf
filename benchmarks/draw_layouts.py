"""Draw which rank owns which token and the work of each rank per hop, computed from the layouts.

python -m benchmarks.draw_layouts --output docs/layouts.svg
python -m benchmarks.draw_layouts --documents 7 10 5 34 8 12 6 4 10 --output docs/packed.svg
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.axes import Axes

from benchmarks.document_packs import starts_of
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout
from megatron_ring.context_parallel.mask import Mask, concatenated_positions
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.context_parallel.visible_rows import visible_keys
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
_SMALLEST_FONT = 5
_DOCUMENT_COLORS = ("#d9d9d9", "#efefef")


def main(
    output: Path = Path("docs/layouts.svg"),
    ring_size: int = 4,
    tokens: int = 32,
    documents: tuple[int, ...] = (),
) -> None:
    """Draw the ring, striped and zigzag layouts and each rank's work per hop under a causal mask.

    With documents also what --document-placement auto chooses, in blocks of one token.

    Args:
        output: The picture to write; its suffix selects the format (svg, png, pdf).
        ring_size: Ranks of the ring, at most 8.
        tokens: Tokens of the sample, a multiple of 2 x ring size. Ignored with --documents.
        documents: Lengths of the documents packed into the sample; none: a single document.
    """
    tokens = sum(documents) or tokens
    mask = Mask(document_starts=starts_of(documents, tokens) if documents else ())
    drawn = {
        name: (Layout(name, tokens, ring_size), mask) for name in ("ring", "striped", "zigzag")
    }
    drawn |= _placed(drawn["striped"][0], mask)
    max_work = max(visible_pairs_per_hop(*case).work_RR.max().item() for case in drawn.values())
    figure, rows = plt.subplots(
        len(drawn),
        2,
        figsize=(10, 1.4 * len(drawn)),
        width_ratios=[2, 1],
        layout="tight",
        squeeze=False,
    )
    for (name, case), (owners, work) in zip(drawn.items(), rows):
        _draw_owners(owners, name, *case)
        _draw_documents(owners, [*mask.document_starts, tokens])
        _draw_work(work, *case, max_work)
    output.parent.mkdir(parents=True, exist_ok=True)
    # No date and no random ids, so that the same layouts give the same file.
    plt.rcParams["svg.hashsalt"] = "layouts"
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
    print(f"drew {output}")


def _placed(striped: Layout, mask: Mask) -> Iterator[tuple[str, tuple[Layout, Mask]]]:
    """Yield the sample with its documents placed by size, if it has a placement."""
    if mask.document_starts:
        layout = replace(striped, placement=DocumentPlacement(block=1))
        placements = place_samples(torch.tensor(mask.document_starts), 1, layout)
        if placements != (None,):
            yield "placed", (layout, replace(mask, placements=placements))


def _draw_owners(axes: Axes, name: str, layout: Layout, mask: Mask) -> None:
    """Draw a box per token in the color of its ring rank, with the number where it fits."""
    fontsize = min(8, 400 / layout.seq_length)
    for ring_rank in range(layout.ring_size):
        for position in concatenated_positions(layout, ring_rank, mask).tolist():
            axes.add_patch(plt.Rectangle((position, 0), 0.92, 1, color=_RANK_COLORS[ring_rank]))
            if fontsize < _SMALLEST_FONT:
                continue
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
    axes.set_title(f"{name}: which ring rank owns a token", fontsize=10)
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
    axes.set_xticklabels([f"hop {hop + 1}" for hop in range(layout.ring_size)], fontsize=8)
    title = "work of each rank"
    if mask.document_starts:
        title = (
            f"slowest rank {timeline.imbalance:.2f} x mean, {_rows_sent(layout, mask)} rows sent"
        )
    axes.set_title(title, fontsize=10)


def _rows_sent(layout: Layout, mask: Mask) -> int:
    """Return how many rows of keys leave their rank in a forward pass."""
    ranks = range(layout.ring_size)
    return sum(
        len(visible_keys(layout, reader, owner, mask))
        for reader in ranks
        for owner in ranks
        if reader != owner
    )


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
