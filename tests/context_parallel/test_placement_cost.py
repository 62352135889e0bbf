"""The rates of a hop's costs, and the counts that they are computed from."""

import pytest
import torch

from benchmarks.document_packs import random_starts
from megatron_ring.context_parallel import placement_cost
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask, hop_key_ranges
from megatron_ring.context_parallel.placement_cost import measured_costs
from megatron_ring.context_parallel.sample_blocks import BLOCK
from megatron_ring.kernels.attention.measured import MEASURED, MaskKind
from megatron_ring.kernels.attention.tile_lists import tile_list

LAYOUT = Layout("striped", 65536, 8)


@pytest.mark.parametrize(
    ("mask", "tiles"),
    [
        (CAUSAL, placement_cost.DOCUMENT_TILES),
        (Mask(document_starts=random_starts(4096, 65536)), placement_cost.PACK_TILES),
    ],
)
def test_the_counts_are_those_of_the_measured_ring(mask, tiles):
    hops = [hop_key_ranges(LAYOUT, 4, source, mask) for source in range(8)]
    listed = [tile_list(hop.lo, hop.hi, BLOCK, BLOCK) for hop in hops]
    assert sum(int((-(-hop.columns // BLOCK)).sum()) for hop in listed) == tiles
    assert sum(len(hop.start) for hop in listed) == placement_cost.QUERY_TILES


def test_the_rates_give_both_measured_times():
    costs = measured_costs()
    for mask, tiles in (
        (MaskKind.CAUSAL, placement_cost.DOCUMENT_TILES),
        (MaskKind.SPARSE, placement_cost.PACK_TILES),
    ):
        [line] = [
            line
            for line in MEASURED
            if (line.device, line.dtype, line.mask)
            == (placement_cost.MEASURED_DEVICE, torch.bfloat16, mask)
        ]
        seconds = costs.tile * tiles + costs.query_tile * placement_cost.QUERY_TILES
        assert seconds == pytest.approx(line.milliseconds[placement_cost.KERNEL] / 1000)
    assert costs.tile > 0
    assert costs.query_tile > 0


def test_a_row_takes_its_bytes_over_the_rate_of_the_link():
    assert measured_costs(row_bytes=4096, bytes_per_second=2048).row == 2
    assert measured_costs().row == 0
