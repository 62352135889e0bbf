import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.config import ParallelConfig
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Coordinates, Grid

sizes = st.integers(1, 3)
grids = st.builds(Grid, pipe=sizes, data=sizes, ring=sizes, ulysses=sizes, tensor=sizes)
axes = st.sets(st.sampled_from(Coordinates._fields))


def test_eight_processes_by_two_data_and_four_ring_ranks():
    grid = Grid(data=2, ring=4)
    assert grid.members("ring") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.members("data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.members("data", "ring") == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert grid.members("tensor") == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert grid.coordinates(6) == Coordinates(pipe=0, data=1, ring=2, ulysses=0, tensor=0)


@given(grids)
def test_ranks_follow_the_formula(grid):
    """rank = ((pipe * D + data) * C + context) * T + tensor, ring outer and Ulysses inner in the context."""
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        context = at.ring * grid.ulysses + at.ulysses
        assert (
            rank
            == ((at.pipe * grid.data + at.data) * grid.context + context) * grid.tensor + at.tensor
        )


@given(grids)
def test_every_place_on_the_grid_has_one_rank(grid):
    places = itertools.product(*(range(size) for size in grid.sizes))
    assert [grid.global_rank(Coordinates(*place)) for place in places] == list(
        range(grid.world_size)
    )
    assert all(grid.global_rank(grid.coordinates(rank)) == rank for rank in range(grid.world_size))


@given(grids, axes)
def test_members_share_all_other_coordinates_and_part_the_world_among_them(grid, axes):
    groups = grid.members(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
    fixed = [name for name in Coordinates._fields if name not in axes]
    places = [
        {tuple(getattr(grid.coordinates(rank), name) for name in fixed) for rank in group}
        for group in groups
    ]
    assert all(len(place) == 1 for place in places)
    assert len(set.union(*places)) == len(groups)
    assert all(group == sorted(group) for group in groups)


@given(grids)
def test_sizes_of_axes_taken_together(grid):
    assert grid.context == grid.ring * grid.ulysses
    assert grid.data_context == grid.data * grid.context
    assert grid.world_size == grid.pipe * grid.data_context * grid.tensor


striped = functools.partial(ParallelConfig, context_parallel="striped")
MADE = [
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


@pytest.mark.parametrize(("config", "world_size", "grid"), MADE)
def test_the_grid_that_a_config_makes(config, world_size, grid):
    assert degrees.problems(config, world_size) == []
    assert Grid.of(config, world_size) == grid
    assert grid.world_size == world_size


@given(grids)
def test_a_grid_is_made_of_its_own_sizes(grid):
    config = striped(
        context_parallel_size=grid.context,
        ulysses_degree=grid.ulysses,
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipe,
    )
    assert Grid.of(config, grid.world_size) == grid
