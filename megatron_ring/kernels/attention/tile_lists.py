"""The tiles of a hop for kernels that loop over columns in each tile, the longest loop first.

A tile is ``block`` neighbouring rows; its loop runs over the columns that any of them sees, in
steps of ``step`` columns. Rows and columns are queries and keys with the key ranges, or keys and
queries with the query ranges: both bounds are non-decreasing in both.

The list is computed on the host, once per hop and mask. It leaves out tiles in which nothing is
visible: no program is launched and nothing is loaded for them. Programs start in the order of the
list, so that no long loop begins when the other processors of a GPU are almost done.
"""

from typing import NamedTuple

import torch

STEPS_PER_FILL = 4
"""A loop is not split if so many unmasked steps, or fewer, are gained for each masked part.

Each part of a loop fills its pipeline anew: it waits for memory about as long as a step computes.
A mask costs a step a few instructions per element. An estimate, not measured.
"""


class TileList(NamedTuple):
    """The fields of one tile in a list, in the order in which kernels load them.

    start: the first row. first, stop: the columns of the loop; first is a multiple of the step.
    unmasked_from, unmasked_to: all rows see the steps between them completely, so these need no
        mask; both equal ``stop`` if there are none or few (``STEPS_PER_FILL``), or if the tile has
        fewer than ``block`` rows.
    """

    start: torch.Tensor
    first: torch.Tensor
    unmasked_from: torch.Tensor
    unmasked_to: torch.Tensor
    stop: torch.Tensor

    @property
    def columns(self) -> torch.Tensor:
        """The number of columns of each loop."""
        return self.stop - self.first


def tile_list(lo: torch.Tensor, hi: torch.Tensor, block: int, step: int) -> TileList:
    """List the tiles of rows that see any column; each field is (tiles,) int64.

    Args:
        lo, hi: The columns [lo, hi) that each row sees.
    """
    rows = len(lo)
    sees = hi > lo
    row = torch.arange(rows)
    # The first row at or after, and the last row at or before each row, that sees a column. Bounds
    # are non-decreasing, so these two rows of a tile have its smallest lo and largest hi.
    seeing_from = torch.where(sees, row, rows).flip(0).cummin(0).values.flip(0)
    seeing_to = torch.where(sees, row, -1).cummax(0).values
    starts = torch.arange(0, rows, block)
    lasts = (starts + block).clamp(max=rows) - 1
    visited = seeing_from[starts] <= lasts
    starts, lasts = starts[visited], lasts[visited]
    first = lo[seeing_from[starts]] // step * step
    stop = hi[seeing_to[lasts]]
    # The columns that every row sees, none if a row sees nothing.
    unmasked_from = (lo[lasts] + step - 1) // step * step
    unmasked_to = hi[starts] // step * step
    unmasked_steps = (unmasked_to - unmasked_from) // step
    masked_parts = (unmasked_from > first).long() + (stop > unmasked_to)
    merged = (unmasked_steps <= 0) | (unmasked_steps <= STEPS_PER_FILL * masked_parts)
    merged |= starts + block > rows
    unmasked_from, unmasked_to = (
        torch.where(merged, stop, x) for x in (unmasked_from, unmasked_to)
    )
    tiles = TileList(starts, first, unmasked_from, unmasked_to, stop)
    longest_first = torch.argsort(tiles.columns, descending=True, stable=True)
    return TileList(*(x[longest_first] for x in tiles))
