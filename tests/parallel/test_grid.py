"""The grid's arithmetic: ranks, coordinates, groups, and the layers of pipeline stages."""

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.config import ParallelConfig
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Coordinates, Grid, layers_of_stage

sizes = st.integers(1, 3)
grids = st.builds(Grid, pipe=sizes, data=sizes, ring=sizes, ulysses=sizes, tensor=sizes)
axes = st.sets(st.sampled_from(Coordinates._fields))


def test_eight_processes_as_two_data_and_four_ring_ranks():
    grid = Grid(data=2, ring=4)
    assert grid.members("ring") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.members("data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.members("data", "ring") == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert grid.members("tensor") == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert grid.coordinates(6) == Coordinates(pipe=0, data=1, ring=2, ulysses=0, tensor=0)


@given(grids)
def test_ranks_follow_the_formula(grid):
    """rank = ((pipe * D + data) * C + context) * T + tensor, context = ring * U + ulysses."""
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        context = at.ring * grid.ulysses + at.ulysses
        data_context = (at.pipe * grid.data + at.data) * grid.context + context
        assert rank == data_context * grid.tensor + at.tensor


@given(grids)
def test_every_position_on_the_grid_has_one_rank(grid):
    positions = itertools.product(*(range(size) for size in grid.sizes))
    ranks = [grid.global_rank(Coordinates(*position)) for position in positions]
    assert ranks == list(range(grid.world_size))
    assert all(grid.global_rank(grid.coordinates(rank)) == rank for rank in range(grid.world_size))


@given(grids, axes)
def test_groups_share_all_other_coordinates_and_partition_the_ranks(grid, axes):
    groups = grid.members(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
    fixed = [name for name in Coordinates._fields if name not in axes]
    fixed_coordinates = [
        {tuple(getattr(grid.coordinates(rank), name) for name in fixed) for rank in group}
        for group in groups
    ]
    assert all(len(coordinates) == 1 for coordinates in fixed_coordinates)
    assert len(set.union(*fixed_coordinates)) == len(groups)
    assert all(group == sorted(group) for group in groups)


@given(grids)
def test_sizes_of_combined_axes(grid):
    assert grid.context == grid.ring * grid.ulysses
    assert grid.data_context == grid.data * grid.context
    assert grid.world_size == grid.pipe * grid.data_context * grid.tensor


striped = functools.partial(ParallelConfig, context_parallel="striped")
GRIDS_OF_CONFIGS = [
    (ParallelConfig(), 1, Grid()),
    (ParallelConfig(), 4, Grid(data=4)),
    (striped(), 4, Grid(ring=4)),
    (ParallelConfig(context_parallel="zigzag", context_parallel_size=2), 8, Grid(data=4, ring=2)),
    (ParallelConfig(context_parallel="ring", context_parallel_size=1), 3, Grid(data=3)),
    (ParallelConfig(context_parallel="ring", world_size=2), 2, Grid(ring=2)),
    (
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3),
        12,
        Grid(pipe=3, data=2, tensor=2),
    ),
    (
        striped(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        16,
        Grid(pipe=2, ring=4, tensor=2),
    ),
    (striped(tensor_model_parallel_size=2, ulysses_degree=2), 8, Grid(ring=2, ulysses=2, tensor=2)),
    (striped(context_parallel_size=4, ulysses_degree=4), 8, Grid(data=2, ulysses=4)),
    (
        striped(
            context_parallel_size=4,
            ulysses_degree=2,
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
        ),
        32,
        Grid(pipe=2, data=2, ring=2, ulysses=2, tensor=2),
    ),
]


@pytest.mark.parametrize(("config", "world_size", "grid"), GRIDS_OF_CONFIGS)
def test_the_grid_of_a_config(config, world_size, grid):
    assert degrees.problems(config, world_size) == []
    assert Grid.of(config, world_size) == grid
    assert grid.world_size == world_size


@given(grids)
def test_a_config_with_the_sizes_of_a_grid_gives_that_grid(grid):
    config = striped(
        context_parallel_size=grid.context,
        ulysses_degree=grid.ulysses,
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipe,
    )
    assert Grid.of(config, grid.world_size) == grid


def test_seven_layers_over_three_stages():
    layers = [layers_of_stage(7, 3, stage) for stage in range(3)]
    assert layers == [range(0, 3), range(3, 5), range(5, 7)]


stage_counts = st.integers(1, 9)


@given(st.integers(0, 40), stage_counts)
def test_every_layer_is_on_one_stage_in_order(num_layers, stages):
    layers = [layers_of_stage(num_layers, stages, stage) for stage in range(stages)]
    assert list(itertools.chain.from_iterable(layers)) == list(range(num_layers))


@given(st.integers(0, 40), stage_counts)
def test_stages_differ_by_at_most_one_layer_and_the_first_have_most(num_layers, stages):
    counts = [len(layers_of_stage(num_layers, stages, stage)) for stage in range(stages)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
