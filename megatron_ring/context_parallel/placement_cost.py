"""What a hop costs a rank, for choosing the placement of documents: rates from measured times.

Two measurements of one kernel determine two rates. A ring over one long document and one over a
pack load every query tile in every hop, but visit different numbers of tiles; the difference in
time is that of the tiles, and what remains is the loading of query tiles and of their state. Both
had work in all eight hops, so the price of a launch cannot be separated from them: it is in the
rate of the query tiles.
"""

import torch

from megatron_ring.context_parallel.sample_blocks import HopCosts
from megatron_ring.kernels.attention.measured import MEASURED, MaskKind

# Of the rank with the most visible pairs in benchmarks/bench_gpu.py's measurements for SPARSE and
# CAUSAL: 8 ranks of 8,192 tokens, single tokens, documents of 4,096 on average. Tests count them.
PACK_TILES = 3160
DOCUMENT_TILES = 16640
QUERY_TILES = 512

MEASURED_DEVICE = "NVIDIA H100 80GB HBM3"
KERNEL = "triton"


def measured_costs(row_bytes: int = 0, bytes_per_second: float = 0) -> HopCosts:
    """Return the costs in seconds: a layer of 32 query heads of 128, forward and backward, in bf16.

    They are those of the Triton kernel on an H100, the only device with both measurements at this
    size. A placement depends on the ratios only, for which they are the best estimate elsewhere.

    Args:
        row_bytes: What a row of keys and values takes in forward and backward; 0 leaves out the
            time of messages.
        bytes_per_second: Of a rank's link; required with ``row_bytes``.
    """
    assert not row_bytes or bytes_per_second > 0
    milliseconds = {
        measured.mask: measured.milliseconds[KERNEL]
        for measured in MEASURED
        if measured.device == MEASURED_DEVICE and measured.dtype == torch.bfloat16
    }
    document, pack = milliseconds[MaskKind.CAUSAL], milliseconds[MaskKind.SPARSE]
    tile = (document - pack) / (DOCUMENT_TILES - PACK_TILES) / 1000
    query_tile = (pack / 1000 - PACK_TILES * tile) / QUERY_TILES
    row = row_bytes / bytes_per_second if row_bytes else 0.0
    return HopCosts(tile=tile, query_tile=query_tile, row=row)
