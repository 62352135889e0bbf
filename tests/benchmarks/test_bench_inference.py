"""The inference benchmark: its rounds on two ranks, its memory search on one, and its options."""

import pytest

from benchmarks import bench_inference
from benchmarks.bench_inference import Decode, Memory
from benchmarks.common import MIB
from megatron_ring.errors import ConfigError
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests.distributed import run_ranks

SMALL = Decode(tokens=65, heads=4, kv_heads=2, head_dim=8, rounds=3)


def rounds_of(rank: int, world_size: int) -> list[list[float]]:
    groups = ProcessGroups.build(Grid(ring=world_size), rank)
    return bench_inference._time_rounds(rank, groups, SMALL)


def test_every_round_times_one_rank_and_two():
    first, second = run_ranks(2, rounds_of)
    assert first == second
    assert [len(of_round) for of_round in first] == [4] * SMALL.rounds
    assert all(elapsed > 0 for of_round in first for elapsed in of_round[:2])


def test_the_longest_prompt_within_a_budget_is_found():
    options = Memory(budget_mib=0.75, chunk_tokens=16, step=16, layers=1)
    rows = bench_inference._search(0, ProcessGroups(), options)
    rows.sort(key=lambda row: row.tokens)
    fitting = [row for row in rows if row.live <= options.budget_mib * MIB]
    assert 0 < len(fitting) < len(rows)
    longest, next_longer = rows[len(fitting) - 1 : len(fitting) + 1]
    assert next_longer.tokens == longest.tokens + options.step
    for row in rows:
        # Keys and values of one layer of width 128 in float32.
        assert row.cache == (row.tokens + bench_inference.CONTINUED_TOKENS) * 2 * 128 * 4
        assert row.cache < row.live


@pytest.mark.parametrize(
    ("measure", "options", "flag"),
    [
        (bench_inference.measure_decode, Decode(heads=3, kv_heads=2), "--heads"),
        (bench_inference.measure_decode, Decode(rounds=0), "--rounds"),
        (bench_inference.measure_memory, Memory(nproc=(1, 0)), "--nproc"),
        (bench_inference.measure_memory, Memory(budget_mib=-1.0), "--budget-mib"),
    ],
)
def test_impossible_options_are_refused_before_ranks_start(measure, options, flag):
    with pytest.raises(ConfigError, match=flag):
        measure(options)
