"""One hop through cuDNN's fused attention, with torch's memory-efficient kernel for what cuDNN does not take.

That is masks, and tiles of a single query or key. A plan is made for every new shape, so documents, whose shapes differ
from pack to pack, are not for it, and ``auto`` does not take it for them. Never run on a GPU.
"""

from megatron_ring.kernels.attention import torch_cudnn, torch_efficient
from megatron_ring.kernels.attention.tiled import Operator, Tiled
from megatron_ring.kernels.attention.tiles import Tile, TileKind, Tiling


def _operator(tile: Tile) -> Operator:
    several = all(span.stop - span.start > 1 for span in (tile.queries, tile.keys))
    return torch_cudnn if several and tile.kind is not TileKind.MASKED else torch_efficient


KERNEL = Tiled(Tiling(rows=1024, split_triangles=False), _operator)
