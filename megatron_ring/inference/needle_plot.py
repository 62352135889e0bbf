"""Heatmaps of retrieval: depth over context length, one for each task."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megatron_ring.inference.needles import Cell, mean_accuracy


def draw_heatmap(cells: list[Cell], picture: Path) -> None:
    """Draw one heatmap for each task, depth over length; raises OSError."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    accuracy = {(cell.task, cell.length, cell.depth): cell.accuracy for cell in cells}
    width = 1.6 + (0.6 * len(lengths) + 1.4) * len(tasks)
    figure, panels = plt.subplots(
        1,
        len(tasks),
        figsize=(max(4.0, width), 1.2 + 0.32 * len(depths)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, task in zip(panels[0], tasks):
        grid = [[accuracy[task, length, depth] for length in lengths] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                panel.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
        mean = mean_accuracy(cell for cell in cells if cell.task == task)
        panel.set_title(f"{task}: {mean:.1%}")
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xlabel("tokens")
    panels[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[0].tolist(), label="answered exactly")
    try:
        figure.savefig(picture, dpi=120)
    finally:
        plt.close(figure)
