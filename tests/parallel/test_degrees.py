"""Sizes of axes that the processes do not allow are refused with the legal sizes and flags."""

import functools
import re

import pytest

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.parallel import degrees
from megatron_ring.parallel.grid import Grid

striped = functools.partial(ParallelConfig, context_parallel="striped")
# config, processes, and of each problem: its option and size, other numbers, legal sizes, flags
REFUSED = [
    (ParallelConfig(world_size=8), 4, [("world_size 8", "has 4 processes", [], ["--world-size"])]),
    (
        ParallelConfig(context_parallel_size=2),
        4,
        [("context_parallel_size 2", "context_parallel is none", [], ["--context-parallel"])],
    ),
    (
        ParallelConfig(ulysses_degree=2),
        4,
        [
            (
                "ulysses_degree 2",
                "context_parallel none",
                [],
                ["--context-parallel", "--context-parallel-size", "--ulysses-degree"],
            )
        ],
    ),
    (
        ParallelConfig(context_parallel="ring", context_parallel_size=4),
        6,
        [
            (
                "context_parallel_size 4",
                "the 6 processes that run",
                [1, 2, 3, 6],
                ["--context-parallel-size"],
            )
        ],
    ),
    (
        ParallelConfig(tensor_model_parallel_size=3),
        4,
        [
            (
                "tensor_model_parallel_size 3",
                "the 4 processes that run",
                [1, 2, 4],
                ["--tensor-model-parallel-size"],
            )
        ],
    ),
    (
        ParallelConfig(pipeline_model_parallel_size=2, tensor_model_parallel_size=3),
        8,
        [
            (
                "tensor_model_parallel_size 3",
                "the 4 processes that pipeline_model_parallel_size 2 leaves of 8",
                [1, 2, 4],
                ["--tensor-model-parallel-size"],
            )
        ],
    ),
    (
        striped(
            pipeline_model_parallel_size=2, tensor_model_parallel_size=2, context_parallel_size=4
        ),
        8,
        [
            (
                "context_parallel_size 4",
                "the 2 processes that pipeline_model_parallel_size 2 and "
                "tensor_model_parallel_size 2 leave of 8",
                [1, 2],
                ["--context-parallel-size"],
            )
        ],
    ),
    (
        striped(context_parallel_size=4, ulysses_degree=3),
        8,
        [
            (
                "ulysses_degree 3",
                "the 4 context ranks",
                [1, 2, 4],
                ["--ulysses-degree", "--context-parallel-size"],
            )
        ],
    ),
    (
        striped(ulysses_degree=4, tensor_model_parallel_size=2),
        4,
        [
            (
                "ulysses_degree 4",
                "the 2 context ranks",
                [1, 2],
                ["--ulysses-degree", "--context-parallel-size"],
            )
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
            (
                "pipeline_model_parallel_size 5",
                "the 8 processes that run",
                [1, 2, 4, 8],
                ["--pipeline-model-parallel-size"],
            ),
            (
                "tensor_model_parallel_size 3",
                "the 8 processes that run",
                [1, 2, 4, 8],
                ["--tensor-model-parallel-size"],
            ),
            (
                "ulysses_degree 4",
                "the 2 context ranks",
                [1, 2],
                ["--ulysses-degree", "--context-parallel-size"],
            ),
        ],
    ),
]


@pytest.mark.parametrize(("config", "world_size", "expected"), REFUSED)
def test_a_grid_that_does_not_fit_is_refused_with_sizes_and_flags(config, world_size, expected):
    problems = degrees.problems(config, world_size)
    assert len(problems) == len(expected)
    for problem, (option, numbers, legal, flags) in zip(problems, expected):
        assert problem.startswith(option + " ")
        assert numbers in problem
        assert legal_sizes(problem) == legal
        assert re.findall(r"--[a-z-]+", problem) == flags
    with pytest.raises(ConfigError) as raised:
        Grid.of(config, world_size)
    assert raised.value.problems == problems


def legal_sizes(problem: str) -> list[int]:
    listed = re.search(r"Legal: ([\d, ]+)\.", problem)
    return [int(size) for size in listed[1].split(", ")] if listed else []


def test_illegal_sizes_are_reported_before_they_divide_anything():
    config = ParallelConfig(
        context_parallel="ring", tensor_model_parallel_size=0, context_parallel_size=-1
    )
    with pytest.raises(ConfigError) as raised:
        Grid.of(config, 2)
    assert raised.value.problems == config.problems() != []


def test_a_dry_run_names_the_option_for_the_number_of_processes():
    problems = degrees.problems(ParallelConfig(tensor_model_parallel_size=2), 1, dry_run=True)
    assert [re.findall(r"--[a-z-]+", problem) for problem in problems] == [
        ["--tensor-model-parallel-size", "--world-size"]
    ]
