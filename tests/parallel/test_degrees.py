"""Degrees that processes cannot have are refused, each with the sizes that would do."""

import functools

import pytest

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Grid

striped = functools.partial(ParallelConfig, context_parallel="striped")
NOT_MADE = [
    (
        ParallelConfig(world_size=8),
        4,
        [
            "world_size 8 is what this config is meant for, but 4 processes run. Start 8, or set --world-size 0."
        ],
    ),
    (
        ParallelConfig(context_parallel_size=2),
        4,
        [
            "context_parallel_size 2 needs a layout, but context_parallel is none. "
            "Set --context-parallel striped (or ring, zigzag)."
        ],
    ),
    (
        ParallelConfig(ulysses_degree=2),
        4,
        [
            "ulysses_degree 2 splits sequences, but context_parallel none keeps them whole. Set --context-parallel "
            "striped (with --context-parallel-size 2: a ring of one), or --ulysses-degree 1."
        ],
    ),
    (
        ParallelConfig(context_parallel="ring", context_parallel_size=4),
        6,
        [
            "context_parallel_size 4 does not divide the 6 processes that run. Legal: 1, 2, 3, 6. "
            "Set --context-parallel-size, or start another number of processes."
        ],
    ),
    (
        ParallelConfig(tensor_model_parallel_size=3),
        4,
        [
            "tensor_model_parallel_size 3 does not divide the 4 processes that run. Legal: 1, 2, 4. "
            "Set --tensor-model-parallel-size, or start another number of processes."
        ],
    ),
    (
        ParallelConfig(pipeline_model_parallel_size=2, tensor_model_parallel_size=3),
        8,
        [
            "tensor_model_parallel_size 3 does not divide the 4 processes that pipeline_model_parallel_size 2 leaves "
            "of 8. Legal: 1, 2, 4. Set --tensor-model-parallel-size, or start another number of processes."
        ],
    ),
    (
        striped(
            pipeline_model_parallel_size=2, tensor_model_parallel_size=2, context_parallel_size=4
        ),
        8,
        [
            "context_parallel_size 4 does not divide the 2 processes that pipeline_model_parallel_size 2 and "
            "tensor_model_parallel_size 2 leave of 8. Legal: 1, 2. "
            "Set --context-parallel-size, or start another number of processes."
        ],
    ),
    (
        striped(context_parallel_size=4, ulysses_degree=3),
        8,
        [
            "ulysses_degree 3 does not divide the 4 context ranks. Legal: 1, 2, 4. "
            "Set --ulysses-degree, or --context-parallel-size."
        ],
    ),
    (
        striped(ulysses_degree=4, tensor_model_parallel_size=2),
        4,
        [
            "ulysses_degree 4 does not divide the 2 context ranks. Legal: 1, 2. "
            "Set --ulysses-degree, or --context-parallel-size."
        ],
    ),
    (
        striped(
            pipeline_model_parallel_size=5,
            tensor_model_parallel_size=3,
            context_parallel_size=2,
            ulysses_degree=4,
        ),
        8,
        [
            "pipeline_model_parallel_size 5 does not divide the 8 processes that run. Legal: 1, 2, 4, 8. "
            "Set --pipeline-model-parallel-size, or start another number of processes.",
            "tensor_model_parallel_size 3 does not divide the 8 processes that run. Legal: 1, 2, 4, 8. "
            "Set --tensor-model-parallel-size, or start another number of processes.",
            "ulysses_degree 4 does not divide the 2 context ranks. Legal: 1, 2. "
            "Set --ulysses-degree, or --context-parallel-size.",
        ],
    ),
]


@pytest.mark.parametrize(("config", "world_size", "problems"), NOT_MADE)
def test_a_grid_that_cannot_be_made_says_why_and_what_could(config, world_size, problems):
    assert degrees.problems(config, world_size) == problems
    with pytest.raises(ConfigError) as raised:
        Grid.of(config, world_size)
    assert raised.value.problems == problems


def test_sizes_that_are_illegal_in_themselves_are_said_before_they_divide_anything():
    config = ParallelConfig(
        context_parallel="ring", tensor_model_parallel_size=0, context_parallel_size=-1
    )
    with pytest.raises(ConfigError) as raised:
        Grid.of(config, 2)
    assert raised.value.problems == config.problems() != []


def test_a_dry_run_names_the_option_for_the_number_of_processes():
    found = degrees.problems(ParallelConfig(tensor_model_parallel_size=2), 1, dry_run=True)
    assert [problem.split("Set ")[-1] for problem in found] == [
        "--tensor-model-parallel-size, or --world-size."
    ]
