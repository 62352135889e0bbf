"""The grid: every process has a coordinate on each axis. Pure arithmetic; torch.distributed is not known here.

From slowest to fastest: pipe, data, context, tensor; inside context, ring outer and Ulysses inner, so that the busiest
neighbours sit closest together:

    global_rank = ((pipe * D + data) * C + context) * T + tensor,  C = R x U

DeepSpeed is shown one data axis of size D x C: ZeRO shards over it, and it needs no notion of context.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import ConfigError


class Coordinates(NamedTuple):
    """A process's place on every axis, in rank order from slowest to fastest."""

    pipe: int
    data: int
    ring: int
    ulysses: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """The sizes of the axes."""

    pipe: int = 1
    data: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> Coordinates:
        return Coordinates(self.pipe, self.data, self.ring, self.ulysses, self.tensor)

    @property
    def context(self) -> int:
        """C, the processes that split one sequence."""
        return self.ring * self.ulysses

    @property
    def data_context(self) -> int:
        """D x C, the one data axis that DeepSpeed sees."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        return self.pipe * self.data_context * self.tensor

    def coordinates(self, global_rank: int) -> Coordinates:
        assert 0 <= global_rank < self.world_size
        found = []
        for size in reversed(self.sizes):
            global_rank, coordinate = divmod(global_rank, size)
            found.append(coordinate)
        return Coordinates(*reversed(found))

    def global_rank(self, at: Coordinates) -> int:
        rank = 0
        for size, coordinate in zip(self.sizes, at, strict=True):
            rank = rank * size + coordinate
        return rank

    def members(self, *axes: str) -> list[list[int]]:
        """The groups along ``axes``: in each, those coordinates vary and all others are fixed. Ranks in grid order."""
        free = [name in axes for name in Coordinates._fields]
        fixed = product(*(range(1 if is_free else size) for is_free, size in zip(free, self.sizes, strict=True)))
        inner = list(product(*(range(size if is_free else 1) for is_free, size in zip(free, self.sizes, strict=True))))
        return [
            [self.global_rank(Coordinates(*(a + b for a, b in zip(start, step, strict=True)))) for step in inner]
            for start in fixed
        ]

    @staticmethod
    def of(config: ParallelConfig, world_size: int) -> "Grid":
        """The grid that ``world_size`` processes make; raises ConfigError when the sizes do not multiply to it."""
        if problems := config.problems() or Grid.problems(config, world_size):
            raise ConfigError(problems)
        pipe, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
        context = _context_size(config, world_size)
        return Grid(
            pipe=pipe,
            data=world_size // (pipe * context * tensor),
            ring=context // config.ulysses_degree,
            ulysses=config.ulysses_degree,
            tensor=tensor,
        )

    @staticmethod
    def problems(config: ParallelConfig, world_size: int) -> list[str]:
        """Why ``world_size`` processes cannot make this grid, of sizes that are legal in themselves."""
        if config.world_size not in (0, world_size):
            return [
                f"world_size {config.world_size} is what this config is meant for, but {world_size} processes run. "
                f"Start {config.world_size}, or set --world-size 0."
            ]
        found = _division_problems(config, world_size)
        if config.context_parallel == "none":
            return found + _problems_of_whole_sequences(config)
        if config.context_parallel_size == 0 and found:
            return found  # how many context ranks there are is not known
        return found + _ulysses_problems(config, _context_size(config, world_size))


def _context_size(config: ParallelConfig, world_size: int) -> int:
    """C: what was asked for, or all that pipeline and tensor leave."""
    if config.context_parallel == "none":
        return 1
    left = world_size // (config.pipeline_model_parallel_size * config.tensor_model_parallel_size)
    return config.context_parallel_size or left


def _division_problems(config: ParallelConfig, world_size: int) -> list[str]:
    """Pipeline, tensor and context each divide what those before them leave."""
    sizes = {
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
    }
    if config.context_parallel != "none":
        sizes["context_parallel_size"] = config.context_parallel_size or 1
    left, takers, found = world_size, [], []
    for name, size in sizes.items():
        if left % size == 0:
            left //= size
            takers += [f"{name} {size}"] if size > 1 else []
        else:
            leave = f"that {' and '.join(takers)} leave of {world_size}" if takers else "that run"
            found.append(
                f"{name} {size} does not divide the {left} processes {leave}. Legal: {divisors(left)}. "
                f"Set {_flag(name)}, or start another number of processes."
            )
    return found


def _ulysses_problems(config: ParallelConfig, context: int) -> list[str]:
    degree = config.ulysses_degree
    if context % degree == 0:
        return []
    return [
        f"ulysses_degree {degree} does not divide the {context} context ranks. Legal: {divisors(context)}. "
        "Set --ulysses-degree, or --context-parallel-size."
    ]


def _problems_of_whole_sequences(config: ParallelConfig) -> list[str]:
    found = []
    if config.context_parallel_size > 1:
        found.append(
            f"context_parallel_size {config.context_parallel_size} needs a layout, but context_parallel is none. "
            "Set --context-parallel striped (or ring, zigzag)."
        )
    if (degree := config.ulysses_degree) > 1:
        found.append(
            f"ulysses_degree {degree} splits sequences, but context_parallel none keeps them whole. Set "
            f"--context-parallel striped (with --context-parallel-size {degree}: a ring of one), or --ulysses-degree 1."
        )
    return found


def divisors(number: int) -> str:
    """The sizes of an axis that ``number`` can be shared out over: ``"1, 2, 4"`` for 4."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
