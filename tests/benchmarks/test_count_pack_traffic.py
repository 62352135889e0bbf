"""Counts of tiles, loops and bytes: a hop counted by hand, and what the kernels save for packs."""

import json

import pytest
import torch

from benchmarks import count_pack_traffic
from benchmarks.count_pack_traffic import Shape, count
from megatron_ring.kernels.attention import tile_lists
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.triton.blocks import Blocks
from tests.benchmarks import commands

MIB = 2**20
# Of 32 queries the last 16 see the first 20 keys: one tile of queries, in two steps over keys, or
# two tiles of keys, in one step over queries. Four query heads for two key-value heads of 8.
HALF_SEEN = KeyRanges(torch.zeros(32, dtype=torch.int64), torch.tensor([0] * 16 + [20] * 16))
SHAPE = Shape(heads=4, groups=2, head_dim=8)
ROW, WIDE = 8 * 2, 8 * 4
LISTED = 20  # bytes of a tile in its list
BLOCKS = Blocks(16, 16, 4, 1)


@pytest.mark.parametrize(
    ("kernel", "programs", "inputs", "sums"),
    [
        (
            "forward",
            4,
            4 * (16 * ROW + 32 * 2 * ROW + 16 * 8 + LISTED),
            4 * 16 * 2 * (WIDE + 4),
        ),
        (
            "queries",
            4,
            4 * (16 * (2 * ROW + 8) + 32 * 2 * ROW + 16 * 8 + LISTED),
            4 * 16 * 2 * WIDE,
        ),
        (
            "keys",
            4,
            2 * (32 * 2 * ROW + 32 * 8 + 2 * LISTED) + 4 * 32 * (2 * ROW + 8),
            2 * 32 * 4 * WIDE,
        ),
        (
            "fused",
            4,
            2 * (32 * 2 * ROW + 32 * 8 + 2 * LISTED) + 4 * 32 * (2 * ROW + 8),
            2 * 32 * 4 * WIDE + 4 * 32 * WIDE,
        ),
    ],
)
def test_a_hop_counted_by_hand(kernel, programs, inputs, sums):
    counted = count(kernel, [HALF_SEEN], SHAPE, BLOCKS, processors=1)
    assert counted["launches"] == 1
    assert counted["programs"] == programs
    assert counted["pairs"] * 1e6 == 2 * 16 * 16
    assert counted["visible"] == 16 * 20 / (2 * 16 * 16)
    assert counted["input_mib"] * MIB == inputs
    assert counted["sums_mib"] * MIB == sums
    assert counted["balance"] == 1


def test_a_hop_in_which_nothing_is_visible_launches_nothing():
    nothing = torch.zeros(32, dtype=torch.int64)
    counted = count("forward", [HALF_SEEN, KeyRanges(nothing, nothing)], SHAPE, BLOCKS, 1)
    assert (counted["hops"], counted["launches"], counted["tiles"]) == (2, 1, 1)


def test_programs_go_to_the_first_processor_that_is_free():
    assert count_pack_traffic._busiest([5, 3, 3, 1], programs=1, heads=2, processors=2) == 12


@pytest.fixture(scope="module")
def pack_of_64k(tmp_path_factory) -> dict[tuple[int, str], dict]:
    path = tmp_path_factory.mktemp("counts") / "counts.json"
    run = commands.run("count_pack_traffic", "--json", str(path))
    assert run.returncode == 0, run.stderr
    rows = json.loads(path.read_text())["rows"]
    return {(row["stripe_size"], row["kernel"]): row for row in rows}


def test_few_steps_are_masked_with_wide_stripes(pack_of_64k):
    for kernel in ("forward", "fused", "queries", "keys"):
        assert pack_of_64k[128, kernel]["masked"] < 0.07
        assert pack_of_64k[128, kernel]["visible"] > 0.96


def test_the_longest_loops_first_keep_processors_busy(pack_of_64k):
    """In the order of rows, the kernel over keys would keep them busy for 0.61 of the time."""
    assert all(row["balance"] > 0.95 for row in pack_of_64k.values())


def test_the_fused_kernel_starts_fewer_loops(pack_of_64k):
    for stripe_size, at_most in ((1, 0.12), (128, 0.13)):
        two = sum(pack_of_64k[stripe_size, kernel]["fills"] for kernel in ("queries", "keys"))
        assert pack_of_64k[stripe_size, "fused"]["fills"] < at_most * two


def test_splitting_fewer_loops_starts_fewer(monkeypatch):
    ranges = KeyRanges(torch.zeros(256, dtype=torch.int64), torch.arange(256))
    fills = []
    for steps in (0, 4):
        monkeypatch.setattr(tile_lists, "STEPS_PER_FILL", steps)
        fresh = KeyRanges(ranges.lo, ranges.hi)
        fills.append(count("forward", [fresh], SHAPE, BLOCKS, 1)["fills"])
    assert fills[1] < fills[0]
